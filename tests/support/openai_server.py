"""A server with OpenAI's API in the shapes of several kinds, whose model is a function of prompt
and seed. Written after vLLM's and SGLang's own protocol files, which served_model.py names."""

import hashlib
import json
from typing import Any

from distill.data import chat, template
from tests.support.http_servers import Answer, Asked
from tests.support.paths import TOKENIZER

NAME = "tiny"
POSITIONS = 400
_OWNERS = {"vllm": "vllm", "sglang": "sglang", "ours": "qwen3-distill", "other": "system"}
_OPENAI = {"model", "messages", "prompt", "max_tokens", "temperature", "top_p", "stop", "seed"}
_OPENAI |= {"presence_penalty"}
_SHARED = {"top_k", "min_p", "chat_template_kwargs", "logprobs"}
_FIELDS = {
    "other": _OPENAI,
    "ours": _OPENAI | _SHARED | {"return_token_ids", "return_prompt_text"},
    "sglang": _OPENAI | _SHARED | {"separate_reasoning", "repetition_penalty"},
    "vllm": _OPENAI
    | _SHARED
    | {"repetition_penalty", "return_token_ids", "return_prompt_text", "add_special_tokens"},
}


class FakeModel:
    """Answers requests; a field that a server of its kind does not know is refused.

    has_parser: thoughts come in a field of their own, as with vLLM's --reasoning-parser.
    """

    def __init__(self, kind: str = "vllm", has_parser: bool = False) -> None:
        self.kind, self.has_parser = kind, has_parser
        self.tokenizer: Any = chat.load_tokenizer(TOKENIZER)
        self.template: str = self.tokenizer.chat_template

    def __call__(self, asked: Asked) -> Answer:
        if asked.path == "/v1/models":
            entry = {"id": NAME, "object": "model", "owned_by": _OWNERS[self.kind]}
            entry |= {} if self.kind == "other" else {"max_model_len": POSITIONS}
            return Answer({"data": [entry | ({"model_hash": "h"} if self.kind == "ours" else {})]})
        body = asked.body
        unknown = body.keys() - _FIELDS[self.kind]
        if unknown:
            return _refuse(f"unknown field {min(unknown)}")
        if body["model"] != NAME:
            return Answer({"error": {"message": "no such model"}}, 404)
        is_chat = asked.path == "/v1/chat/completions"
        text = self._render(body) if is_chat else body["prompt"]
        ids = chat.encode(self.tokenizer, text) if isinstance(text, str) else text
        if len(ids) + body["max_tokens"] > POSITIONS:
            return _refuse(f"maximum context length is {POSITIONS} tokens")
        return Answer(self._complete(body, ids, is_chat))

    def _render(self, body: dict) -> str:
        self.tokenizer.chat_template = self.template
        thinking = body.get("chat_template_kwargs", {}).get("enable_thinking")
        return template.render_text(self.tokenizer, body["messages"], thinking=thinking)

    def write(self, ids: list[int], seed: int, temperature: float) -> str:
        """Returns the model's whole text after a prompt."""
        key = json.dumps([ids, seed if temperature else 0]).encode()
        number = int.from_bytes(hashlib.sha256(key).digest()[:4], "big")
        final = f"so it is \\boxed{{{number % 3}}}"
        prompt = self.tokenizer.decode(ids)
        if template.ends_with_empty_block(prompt):
            return final
        opened = "" if template.find_opened_block(prompt) else "<think>\n"
        return f"{opened}é {number % 100}\n</think>\n\n{final}"

    def _complete(self, body: dict, ids: list[int], is_chat: bool) -> dict:
        text = self.write(ids, body["seed"], body["temperature"])
        tokens = [*chat.encode(self.tokenizer, text), self.tokenizer.eos_token_id]
        cut = tokens[: body["max_tokens"]]
        reason = "stop" if len(cut) == len(tokens) else "length"
        text = chat.decode(self.tokenizer, cut)
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
        reply = {"model": NAME, "usage": {"completion_tokens": len(cut)}, "choices": [choice]}
        if body.get("return_token_ids"):
            choice["token_ids"] = cut
            (reply if is_chat else choice)["prompt_token_ids"] = ids
        if body.get("return_prompt_text"):
            reply["prompt_text"] = self.tokenizer.decode(ids)
        logp = [-0.5 - i for i in range(len(cut))]
        if not is_chat:
            choice["text"] = text
            if body.get("logprobs") is not None:
                choice["logprobs"] = {"token_logprobs": logp}
            return reply
        choice["message"] = {"role": "assistant", "content": text}
        if self.has_parser:
            thoughts, closed, final = text.removeprefix("<think>\n").partition("\n</think>\n\n")
            choice["message"] = {"content": final if closed else None, "reasoning": thoughts}
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [{"token": "x", "logprob": x} for x in logp]}
        return reply


def _refuse(message: str) -> Answer:
    return Answer({"error": {"message": message, "type": "invalid_request_error"}}, 400)
