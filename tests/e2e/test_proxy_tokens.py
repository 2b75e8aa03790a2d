"""The proxy goes by the tokens that engines tell it: those they hold, and those of a prompt."""

import json
import random

from pair import Client, Pair, eventually, proxied

WORDS = ["streets", "rain", "über", "naïve", "雨", "a,", "the", "<|im_end|>", "12345", "don't\\n"]


def test_what_decode_evicted_is_prefilled(pair: Pair):
    """Prompts go on from one text, with some words more each time."""
    published = json.loads(pair.setup.decode[1])["endpoint"].rpartition(":")[2]
    words = random.Random(77)
    text = "".join(f"{words.randrange(10**6)} " for _ in range(300))

    with proxied(pair, "--min-prefill-tokens", "300", "--kv-events", published) as client:

        def next_prompt() -> bool:
            """Whether decode did it alone; prompts start afresh where it does not matter."""
            nonlocal text
            text += "".join(f"{words.randrange(10**6)} " for _ in range(10))
            before = client.request("GET", "/health")[1]["counters"]["short"]
            status, answer = client.post(text, max_tokens=8)
            assert status == 200, answer
            expected = pair.prefill.tokens(text, 8, cache_salt=f"{len(text)}")
            assert answer["choices"][0]["token_ids"] == expected
            return client.request("GET", "/health")[1]["counters"]["short"] > before

        def dropped() -> bool:
            """Whether the next one is prefilled, once decode has dropped all, and said so."""
            status, _ = pair.decode.request("POST", "/reset_prefix_cache")
            pair.decode.post([*range(1000, 1040)], max_tokens=1)  # events go out with a step
            return status == 200 and not next_prompt()

        assert not next_prompt(), "nobody has it"
        assert next_prompt()
        eventually(dropped, 60, "prefill is asked for what decode has dropped")
        assert next_prompt(), "it has got it again"


def test_a_prompt_that_is_tokenized_once_is_answered_alike(pair: Pair):
    """The client's answer, whole and streamed, of texts and chats, but for ids and times."""
    words = random.Random(78)

    def ask(client: Client, path: str, body: dict) -> tuple[list, ...]:
        """What an answer says, however many tokens come in one event."""
        sent = {"model": client.model, "temperature": 0, "max_tokens": 8, "logprobs": 1, **body}
        status, answer = client.request("POST", path, sent)
        assert status == 200, answer
        events = [answer]
        if isinstance(answer, str):
            lines = [line.removeprefix("data: ") for line in answer.splitlines() if line]
            events = [json.loads(line) for line in lines if line != "[DONE]"]
        choices = [one for event in events for one in event["choices"]]
        said = [one.get("text") or one.get("delta", one.get("message")) for one in choices]
        text = [one if isinstance(one, str) else one.get("content") or "" for one in said]
        ids = [token for one in choices for token in one.get("token_ids") or ()]
        prompts = [one.get("prompt_token_ids") for one in (*events, *choices)]
        usage = [event["usage"] for event in events if event.get("usage")]
        return ["".join(text)], ids, [one for one in prompts if one], usage

    with proxied(pair) as plain, proxied(pair, "--tokenize-once") as once:
        for number, stream in enumerate((False, True) * 2):
            text = f"{number} " + "".join(f"{words.choice(WORDS)} " for _ in range(400))
            chat = {"messages": [{"role": "user", "content": text}], "logprobs": True}
            for path, body in (
                ("/v1/completions", {"prompt": text}),
                ("/v1/chat/completions", chat),
            ):
                extra = {"stream": stream, "return_token_ids": True}
                if stream:
                    extra["stream_options"] = {"include_usage": True}
                expected = ask(plain, path, body | extra)
                assert all(expected)
                assert ask(once, path, body | extra) == expected
