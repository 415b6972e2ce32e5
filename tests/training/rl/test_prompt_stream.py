from depo_gateway.training.rl.prompt_stream import PromptStream


def test_a_stream_visits_every_prompt_once_a_pass_and_can_be_resumed_anywhere() -> None:
    whole = PromptStream(10, seed=3)
    drawn = whole.draw(30)
    assert [sorted(drawn[at : at + 10]) for at in (0, 10, 20)] == [list(range(10))] * 3
    assert drawn[:10] != drawn[10:20]
    before = PromptStream(10, seed=3)
    before.draw(13)
    assert PromptStream(10, 3, before.epoch, before.cursor).draw(17) == drawn[13:]
