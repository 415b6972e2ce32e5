"""Learning from served traffic: the daemon, refreshes, the publish gate, shadowing."""
