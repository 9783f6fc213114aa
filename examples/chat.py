"""A chat in the terminal that goes back and forks, and does not compute its history again.

Why: every turn of a chat begins with all turns before it. In a pool with a prefix cache it finds their pages, and
computes only what is new. So a conversation is no more than the list of its messages: to take back a turn, or to go on
in two ways, is to shorten or to copy that list.

How: `python examples/chat.py`, and type. `/back` takes back the last question with its answer, `/fork` goes on in a
copy of the conversation, `/switch 0` in another one. `/save FILE` keeps a conversation, and `/load FILE` goes on with
it, in another process, too. Ctrl-D ends it. Questions may come from a pipe:
`echo "Name a colour." | python examples/chat.py`.
"""

import argparse
import json
from pathlib import Path

import transformers
from transformers import TextStreamer

from hf_paged import PagedCache, PagePool, sample
from hf_paged.packaged import load_packaged_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-new-tokens", type=int, default=100, help="of an answer (default: %(default)s)")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load_packaged_model(attn_implementation="paged_flex")
    pool = PagePool.from_model(model, num_pages=512, page_size=16, prefix_cache=True)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def encode(messages: list[dict], **settings):
        return tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt", **settings)

    def answer(messages: list[dict]) -> str:
        inputs = encode(messages, add_generation_prompt=True)
        with PagedCache(pool=pool) as cache:
            tokens = model.generate(
                **inputs,
                past_key_values=cache,
                max_new_tokens=args.max_new_tokens,
                do_sample=True,
                temperature=0.7,
                streamer=streamer,
                custom_generate=sample,
            )
        return tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)

    def save(path: str, messages: list[dict]) -> None:
        with PagedCache(pool=pool) as cache:
            cache.prefill(model, **encode(messages))  # almost all of it is found
            cache.save(path)
        Path(f"{path}.json").write_text(json.dumps(messages))

    def load(path: str) -> list[dict]:
        messages = json.loads(Path(f"{path}.json").read_text())
        with PagedCache.load(path, model, pool=pool) as cache:
            cache.commit(encode(messages).input_ids)  # so that the next turn finds it
        return messages

    conversations: list[list[dict]] = [[]]
    number = 0
    while True:
        try:
            line = input(f"{number}> ")
        except (EOFError, KeyboardInterrupt):
            break
        messages = conversations[number]
        match line.split():
            case []:
                pass
            case ["/back"]:
                del messages[-2:]
            case ["/fork"]:
                number = len(conversations)
                conversations.append(list(messages))
            case ["/switch", digits] if digits.isdigit() and int(digits) < len(conversations):
                number = int(digits)
            case ["/save", path] if messages:
                try:
                    save(path, messages)
                except OSError as error:
                    print(error)
            case ["/load", path]:
                try:
                    conversations.append(load(path))
                    number = len(conversations) - 1
                except (OSError, ValueError) as error:
                    print(error)
            case [command, *_] if command.startswith("/"):
                print(f"/back, /fork, /switch and a number below {len(conversations)}, /save or /load and a file")
            case _:
                before = pool.stats()
                messages.append({"role": "user", "content": line})
                messages.append({"role": "assistant", "content": answer(messages)})
                stats = pool.stats()
                num_found = stats.num_hit_tokens - before.num_hit_tokens
                print(f"[{num_found} of {stats.num_looked_up_tokens - before.num_looked_up_tokens} tokens found]")


if __name__ == "__main__":
    main()
