"""python -m benchmarks.other_tokenizers: the bias of span-wise credit across tokenizers.

A teacher with another vocabulary gives the log-likelihood of a response's text, log q. Where ends
of its tokens and of the student's coincide, the text falls into spans, and a span's gap is log p of
the student's tokens in it minus log q of the teacher's. Here a student over the characters a, b, c
and an end writes up to four tokens, and every response is enumerated, in float64: the expected
gradient of each way to give credit against that of the sequence-level reverse KL, E[log p - log q].

    span    a token gets the gap of its own span
    later   and those of all spans after it (discount=1)
    whole   a token gets the gap of the whole response

The last is unbiased always. The second would be if the gap of an earlier span never depended on a
token: the expectation of a token's score times what came before it is zero. With a teacher's token
of several characters it does depend: after "a", whether the next is "b" decides if the teacher read
"a" or "ab".
"""

import numpy as np

CHARACTERS, LENGTH = "abc$", 4  # $ ends a response
TEACHERS = {
    "the student's own tokens": (),
    "ab in one token": ("ab",),
    "bc, then ab": ("bc", "ab"),
    "aa, bb, then ab": ("aa", "bb", "ab"),
}


def list_responses(prefix: str = "") -> list[str]:
    """Lists all responses that begin with a prefix."""
    if prefix and (prefix[-1] == "$" or len(prefix) == LENGTH):
        return [prefix]
    return [text for c in CHARACTERS for text in list_responses(prefix + c)]


def merge(text: str, merges: tuple[str, ...]) -> list[str]:
    """Returns the teacher's tokens of a text, by byte-pair merges in their order."""
    tokens = list(text)
    for pair in merges:
        i = 0
        while i < len(tokens) - 1:
            if tokens[i] + tokens[i + 1] == pair:
                tokens[i : i + 2] = [pair]
            i += 1
    return tokens


def draw_logp(seed: int, context: str, size: int) -> np.ndarray:
    """Draws the log-probabilities of a model's tokens after a text."""
    logits = np.random.default_rng([seed, *context.encode()]).normal(size=size)
    return logits - np.log(np.exp(logits).sum())


def find_gaps(text: str, merges: tuple[str, ...]) -> list[tuple[int, int, float]]:
    """Returns (start, end, gap) of the spans of a response."""
    vocabulary, spans, start = [*CHARACTERS, *merges], [], 0
    for token in merge(text, merges):
        end = start + len(token)
        logq = draw_logp(1, text[:start], len(vocabulary))[vocabulary.index(token)]
        logp = sum(draw_logp(0, text[:t], 4)[CHARACTERS.index(text[t])] for t in range(start, end))
        spans.append((start, end, logp - logq))
        start = end
    return spans


def measure(merges: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """Returns of each way to give credit its bias, relative to the gradient's norm, and its
    variance, relative to that of `whole`."""
    texts = list_responses()
    states = {state: i for i, state in enumerate({t[:n]: 0 for t in texts for n in range(LENGTH)})}
    names = ("span", "later", "whole")
    sums = {name: np.zeros((len(states), 4)) for name in names}
    squares = dict.fromkeys(names, 0.0)
    for text in texts:
        spans = find_gaps(text, merges)
        gradient = {name: np.zeros((len(states), 4)) for name in names}
        probability = 1.0
        for t, character in enumerate(text):
            logp = draw_logp(0, text[:t], 4)
            score = -np.exp(logp)
            score[CHARACTERS.index(character)] += 1
            probability *= np.exp(logp[CHARACTERS.index(character)])
            gaps = [gap for _, end, gap in spans if end > t]
            credit = {
                "span": gaps[0],
                "later": sum(gaps),
                "whole": sum(gap for *_, gap in spans),
            }
            for name in names:
                gradient[name][states[text[:t]]] += score * credit[name]
        for name in names:
            sums[name] += probability * gradient[name]
            squares[name] += probability * np.sum(gradient[name] ** 2)
    exact = sums["whole"]
    variances = {name: squares[name] - np.sum(sums[name] ** 2) for name in names}
    return {
        name: (
            float(np.linalg.norm(sums[name] - exact) / np.linalg.norm(exact)),
            float(variances[name] / variances["whole"]),
        )
        for name in names
    }


def main() -> None:
    print("bias (variance) by the teacher's tokens, relative to the gradient (to whole)")
    for title, merges in TEACHERS.items():
        cells = (f"{name} {bias:.1%} ({v:.2f})" for name, (bias, v) in measure(merges).items())
        print(f"  {title:26}", ", ".join(cells))


if __name__ == "__main__":
    main()
