"""One completion through the gateway, and which pool answered why: what `helm test` runs."""

import json
import os
import sys
import time
import urllib.error
import urllib.request

WAIT_SECONDS = 120.0  # for a gateway that has no usable backend yet


def ask(gateway: str, key: str) -> tuple[dict[str, str], dict]:
    """(headers with small letters, body) of one completion whose pool the gateway chooses."""
    body = {"model": "auto", "messages": [{"role": "user", "content": "What is 2 + 2?"}], "max_tokens": 16}
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(f"{gateway}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as answer:
        return {name.lower(): value for name, value in answer.headers.items()}, json.load(answer)


def asked_until_ready(gateway: str, key: str) -> tuple[dict[str, str], dict]:
    """The same, again while the gateway or its backends are still starting; ends the process where that is no use."""
    end = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return ask(gateway, key)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            if error.code == 401:
                sys.exit(f"{said}\nThe gateway wants a key: name a Secret that holds one in test.apiKey")
            if error.code != 503 or time.monotonic() > end:
                sys.exit(f"HTTP {error.code}: {said}")
        except OSError as error:
            if time.monotonic() > end:
                sys.exit(f"{gateway}: {error}")
        time.sleep(3)


headers, body = asked_until_ready(os.environ["GATEWAY"], os.environ.get("API_KEY", ""))
pool, reason = headers.get("x-depo-pool"), headers.get("x-depo-reason")
if pool not in os.environ["POOLS"].split() or not reason or not headers.get("x-request-id"):
    sys.exit(f"an answer without its routing: x-depo-pool {pool!r}, x-depo-reason {reason!r}")
if "message" not in body["choices"][0]:
    sys.exit(f"no completion: {json.dumps(body)}")
said = body["choices"][0]["message"].get("content")
sys.stdout.write(f"{pool} answered ({reason}, estimator {headers.get('x-depo-estimator')}): {said}\n")
