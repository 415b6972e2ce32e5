"""Reading YAML settings into typed, closed dataclasses; settings that both programs share."""
