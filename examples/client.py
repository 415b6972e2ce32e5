"""The openai client with the gateway: only the address and the model's name differ.

python examples/client.py http://127.0.0.1:8000/v1
"""

import sys

from openai import OpenAI

QUESTIONS = ("What is the capital of Portugal?", "Prove that there are infinitely many primes congruent to 3 modulo 4.")


def main() -> None:
    base_url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
    client = OpenAI(base_url=base_url, api_key="unused-where-the-gateway-is-open")
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        raw = client.chat.completions.with_raw_response.create(model="auto", messages=messages, max_tokens=64)
        pool, reason = raw.headers["x-depo-pool"], raw.headers["x-depo-reason"]
        print(f"{question}\n  {pool} ({reason}): {raw.parse().choices[0].message.content}")
    print("streamed, with a threshold for this call: ", end="")
    stream = client.chat.completions.create(
        model="auto-0.95", messages=[{"role": "user", "content": QUESTIONS[0]}], max_tokens=64, stream=True
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
