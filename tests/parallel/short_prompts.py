"""Prompts of few tokens, and a long one beside them, asked of an engine of several ranks."""

from __future__ import annotations

from collections.abc import Sequence

from needle_documents import Document, DocumentMaker, is_answer, prompt
from parallel_ranks import NEEDLE

from paddle_qwen1m import LLM, SamplingParams

SHORT_TOKENS, SHORT = 80, 8
"""Some 60 tokens without the answer: as many as are read by one question."""
ALONE = 4
"""One after the other: a GPU reads the first as it comes, captures the second, and replays from then on."""


def wrong_answers(degree: int, long_tokens: int) -> list[str]:
    """What the needle checkpoint says where it is not what stands in the document: of short ones together, of some of
    them alone, and of all beside a document of `long_tokens`.
    """
    greedy = SamplingParams(temperature=0.0, max_tokens=24)
    wrong: list[str] = []
    with LLM(str(NEEDLE), tensor_parallel_size=degree, max_model_len=long_tokens) as llm:
        tokenizer = llm.get_tokenizer()

        def encode(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        def ask(documents: Sequence[Document]) -> None:
            prompts = [encode(prompt(document, document.needles[0])) for document in documents]
            for document, told in zip(documents, llm.generate(prompts, greedy, use_tqdm=False)):
                if not is_answer(told.outputs[0].text, document.needles[0]):
                    wrong.append(f"{document.needles[0].sentence} {told.outputs[0].text!r}")

        make = DocumentMaker(encode).make
        short = [make(SHORT_TOKENS, 1, seed) for seed in range(2 * SHORT + ALONE)]
        ask(short[:SHORT])
        for document in short[SHORT : SHORT + ALONE]:
            ask([document])
        ask([make(long_tokens, 1, 0), *short[SHORT + ALONE :]])
    return wrong
