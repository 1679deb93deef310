"""Tasks of the demo model: book text, copying, and facts hidden in book text; and their evaluation.

Every sampler returns one sample as (token ids, weights), both of the requested length; ``weights[i]`` is the share of
the loss that predicting ``ids[i]`` carries.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F

from edgekv.verify import tasks

BOS_TOKEN, EOS_TOKEN = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1
HELD_OUT_FRACTION = 0.02  # the end of every book, never trained on

# The words that `edgekv verify` asks in, in the rhythm of running text.
FACT = " " + tasks.FACT
QUESTION = "Question: " + tasks.QUESTION
ANSWER_CUE = "\nAnswer:"
ANSWER = FACT

# In the demos and the evaluation; part of the training draws ordinary words of the books as well.
NAMES = tasks.NAMES

FILLER_WEIGHT, ANSWER_TEXT_WEIGHT, ANSWER_DIGIT_WEIGHT = 0.1, 1.0, 4.0
COPY_SOURCE_WEIGHT, COPY_TARGET_WEIGHT = 0.03, 1.0

Sample = tuple[list[int], list[float]]


def read_books(folder: Path) -> dict[str, str]:
    """Read every ``*.txt`` of 100 kB or more in ``folder`` (smaller files are notes and excerpts, not books)."""
    books = {p.stem: p.read_text(encoding="utf-8") for p in sorted(folder.glob("*.txt")) if p.stat().st_size >= 100_000}
    if not books:
        raise SystemExit(f"no book (*.txt of 100 kB or more) in {folder}")
    return books


def split_book(text: str) -> tuple[str, str]:
    """Split one book into (training part, held-out last 2 %)."""
    cut = int(len(text) * (1.0 - HELD_OUT_FRACTION))
    return text[:cut], text[cut:]


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = [text[i : i + 20_000] for text in texts for i in range(0, len(text), 20_000)]
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


def encode_books(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Encode each text; returns one list of token ids per text."""
    return [list(tokenizer.encode(text).ids) for text in texts]


@dataclass(frozen=True)
class RetrievalPrompt:
    """A document with hidden facts and one question, ending in the answer cue."""

    prompt_ids: list[int]
    answer_ids: list[int]
    code: str


class TaskSampler:
    """Draws training samples of any length from tokenized books."""

    def __init__(self, tokenizer: Tokenizer, books: list[list[int]], words: list[str], seed: int) -> None:
        self.tokenizer = tokenizer
        self.books = books
        self.words = words  # extra names, so that the question works for names outside NAMES
        self.vocab_size = tokenizer.get_vocab_size()
        self.rng = random.Random(seed)
        self.digit_ids = [tokenizer.encode(digit).ids[0] for digit in "0123456789"]
        self._cache: dict[str, list[int]] = {}

    def _encode(self, text: str) -> list[int]:
        """Encode a short text, remembering those without digits (they recur)."""
        if text in self._cache:
            return self._cache[text]
        ids = list(self.tokenizer.encode(text).ids)
        if len(self._cache) < 50_000 and not re.search(r"\d", text):
            self._cache[text] = ids
        return ids

    def book_slice(self, length: int) -> list[int]:
        """Return ``length`` consecutive tokens of a book (books drawn in proportion to their size)."""
        book = self.rng.choices(self.books, weights=[max(0, len(b) - length) for b in self.books])[0]
        start = self.rng.randint(0, len(book) - length)
        return book[start : start + length]

    def text(self, length: int) -> Sample:
        """Plain book text, every token equally important."""
        return self.book_slice(length), [1.0] * length

    def _segment(self, length: int) -> list[int]:
        """Something to copy: book text, digits, or random tokens over an alphabet of random size.

        A small alphabet repeats its bigrams, so copying it needs a match on several preceding tokens: what telling
        apart facts that all read "... is" needs too.
        """
        kind = self.rng.random()
        if kind < 0.25:
            return self.book_slice(length)
        if kind < 0.5:
            return self.rng.choices(self.digit_ids, k=length)
        size = self.rng.choice((12, 32, 128, self.vocab_size - 2))
        alphabet = self.rng.sample(range(2, self.vocab_size), size)
        return self.rng.choices(alphabet, k=length)

    def copying(self, length: int) -> Sample:
        """Segments scattered over book text, then each of them again, in another order and after other text.

        Nothing but its first two tokens announces a repetition, and no distance is usual: only its content tells where
        to copy from.
        """
        count = self.rng.randint(1, max(1, length // 64))
        segments = [self._segment(self.rng.randint(6, length // (2 * count))) for _ in range(count)]
        spare = length - 2 * sum(map(len, segments))
        cuts = sorted(self.rng.randint(0, spare) for _ in range(2 * count))
        pieces = [(segment, COPY_SOURCE_WEIGHT) for segment in segments]
        pieces += [(segment, COPY_TARGET_WEIGHT) for segment in self.rng.sample(segments, count)]
        ids: list[int] = []
        weights: list[float] = []
        for start, end, (segment, weight) in zip([0, *cuts[:-1]], cuts, pieces, strict=True):
            gap = self.book_slice(end - start)
            ids += gap + segment
            weights += [COPY_SOURCE_WEIGHT] * (len(gap) + 2) + [weight] * (len(segment) - 2)
        tail = self.book_slice(spare - cuts[-1])
        return ids + tail, weights + [COPY_SOURCE_WEIGHT] * len(tail)

    def _code(self, digits: int) -> str:
        """Return a random code of so many digits."""
        return "".join(self.rng.choices("0123456789", k=digits))

    def _facts(self, count: int) -> dict[str, str]:
        """Return ``count`` different names with a random code each: four digits, in a third of the samples 2 to 12.

        Long codes teach their digits to be copied in order; with four digits alone, the model long knew which digits
        occur in a code but not their order.
        """
        pool = NAMES if self.rng.random() < 0.6 else NAMES + self.rng.sample(self.words, 64)
        digits = (4, 4) if self.rng.random() < 0.67 else (2, 12)
        return {name: self._code(self.rng.randint(*digits)) for name in self.rng.sample(pool, min(count, len(pool)))}

    def _document(self, facts: dict[str, str], length: int) -> list[int]:
        """Book text of ``length`` tokens in total with the facts inserted at random places (in random order)."""
        fact_ids = [self._encode(FACT.format(name=name, code=code)) for name, code in facts.items()]
        self.rng.shuffle(fact_ids)
        filler = self.book_slice(length - sum(map(len, fact_ids)))
        cuts = sorted(self.rng.randint(0, len(filler)) for _ in fact_ids)
        out: list[int] = []
        for start, end, fact in zip([0, *cuts[:-1]], cuts, fact_ids, strict=True):
            out += filler[start:end] + fact
        return out + filler[cuts[-1] :]

    def retrieval(self, length: int) -> Sample:
        """Facts hidden in book text; then several questions, each with its answer (many supervised tokens a sample)."""
        facts = self._facts(self.rng.randint(1, max(1, min(24, length // 56))))
        most = max(1, min(len(facts), length // 96))
        asked = self.rng.sample(sorted(facts), self.rng.randint((most + 1) // 2, most))
        # The question may also stand at the end of the user's own long text, as a chat turn.
        head = self._encode("Question: ") if self.rng.random() < 0.3 else []
        tail: list[int] = []
        tail_weights: list[float] = []
        for i, name in enumerate(asked):
            question = QUESTION.format(name=name)
            lead = " " + question.removeprefix("Question: ") if head and i == 0 else "\n" + question
            cue = self._encode(lead + ANSWER_CUE)
            answer = [*self._encode(ANSWER.format(name=name, code=facts[name])), EOS_ID]
            # The answer ends in: the digits, a full stop, the end of the sequence.
            digits = len(facts[name])
            text_weights = [ANSWER_TEXT_WEIGHT] * (len(answer) - digits - 2)
            answer_weights = text_weights + [ANSWER_DIGIT_WEIGHT] * digits + [0.5, 0.5]
            tail += cue + answer
            tail_weights += [FILLER_WEIGHT] * len(cue) + answer_weights
        document = head + self._document(facts, length - len(tail) - len(head))
        return document + tail, [FILLER_WEIGHT] * len(document) + tail_weights

    def retrieval_prompt(self, prompt_tokens: int, fact_count: int) -> RetrievalPrompt:
        """One question about one of ``fact_count`` facts (names of NAMES), exactly ``prompt_tokens`` long."""
        facts, name = self._evaluation_facts(fact_count)
        cue = self._cue(name)
        return self._asked(self._document(facts, prompt_tokens - len(cue)), cue, name, facts)

    def retrieval_prompts(self, prompt_tokens: int, fact_count: int) -> list[RetrievalPrompt]:
        """One document, asked for each of its facts in turn; the longest prompt has exactly ``prompt_tokens``."""
        facts, _ = self._evaluation_facts(fact_count)
        cues = {name: self._cue(name) for name in facts}
        document = self._document(facts, prompt_tokens - max(map(len, cues.values())))
        return [self._asked(document, cue, name, facts) for name, cue in cues.items()]

    def _evaluation_facts(self, count: int) -> tuple[dict[str, str], str]:
        """Return ``count`` facts with names of NAMES and codes of four digits, and the name of one of them."""
        names = self.rng.sample(NAMES, count)
        facts = {name: self._code(4) for name in names}
        return facts, self.rng.choice(names)

    def _cue(self, name: str) -> list[int]:
        return self._encode("\n" + QUESTION.format(name=name) + ANSWER_CUE)

    def _asked(self, document: list[int], cue: list[int], name: str, facts: dict[str, str]) -> RetrievalPrompt:
        answer = [*self._encode(ANSWER.format(name=name, code=facts[name])), EOS_ID]
        return RetrievalPrompt(document + cue, answer, facts[name])

    def mixed(self, length: int, shares: dict[str, float]) -> Sample:
        """One sample of a task drawn by ``shares`` (keys: text, copying, retrieval)."""
        task = self.rng.choices(list(shares), weights=list(shares.values()))[0]
        samplers = {"text": self.text, "copying": self.copying, "retrieval": self.retrieval}
        return samplers[task](length)

    def positions(self, length: int, longest: int) -> list[int]:
        """Position numbers with one to three random jumps, so that a short sample spans up to ``longest`` positions.

        Attention over long distances is thereby trained at the price of a short sequence.
        """
        jumps = self.rng.randint(1, 3)
        spare = self.rng.randint(0, max(0, longest - length))
        sizes = sorted(self.rng.randint(0, spare) for _ in range(jumps - 1))
        totals = [0, *sizes, spare]
        cuts = [0, *sorted(self.rng.randint(1, length - 1) for _ in range(jumps)), length]
        spans = zip(totals, cuts[:-1], cuts[1:], strict=True)
        return [p + total for total, start, end in spans for p in range(start, end)]


def name_words(texts: list[str]) -> list[str]:
    """Lower-case words of 4 to 8 letters that occur in the books often enough to be ordinary words."""
    counts: dict[str, int] = {}
    for text in texts:
        for word in re.findall(r"\b[a-z]{4,8}\b", text):
            counts[word] = counts.get(word, 0) + 1
    return sorted(word for word, count in counts.items() if count >= 20)


def _retrieval_hits(model: Any, tokenizer: Tokenizer, prompts: list[RetrievalPrompt]) -> tuple[int, int]:
    """Greedily answer ``prompts`` (all of one length): how many answers are right, how many also end there."""
    ids = torch.tensor([p.prompt_ids for p in prompts])
    longest = max(len(p.answer_ids) for p in prompts)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest, do_sample=False)
    right = ended = 0
    for prompt, tail in zip(prompts, out[:, ids.shape[1] :].tolist(), strict=True):
        answer = tokenizer.decode(prompt.answer_ids)  # special tokens are left out
        right += tokenizer.decode(tail).startswith(answer)
        ended += tail[: len(prompt.answer_ids)] == prompt.answer_ids
    return right, ended


def _perplexity(model: Any, books: list[list[int]], window: int) -> tuple[float, int]:
    """Perplexity per token over the whole windows of ``books`` that do not overlap; and the number of tokens."""
    total, count = 0.0, 0
    for book in books:
        for start in range(0, len(book) - window, window):
            ids = torch.tensor([book[start : start + window + 1]])
            with torch.no_grad():
                logits = model(ids[:, :-1]).logits
            total += F.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
            count += window
    return math.exp(total / count), count


def evaluate(folder: Path, books_folder: Path, samples: int, seed: int) -> None:
    """Load an exported model with transformers; print retrieval, perplexity and a text sample on held-out text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    wrapped: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    books = encode_books(tokenizer, [split_book(text)[1] for text in read_books(books_folder).values()])
    print(f"{sum(map(len, books))} held-out tokens; greedy decoding, float32")
    for fact_count in (1, 4, 8):
        for prompt_tokens in (256, 512, 1024, 2048, 4096):
            # A seed of its own: the same prompts whatever else is evaluated.
            sampler = TaskSampler(tokenizer, books, [], seed + 10_000 * fact_count + prompt_tokens)
            prompts = [sampler.retrieval_prompt(prompt_tokens, fact_count) for _ in range(samples)]
            scores = [_retrieval_hits(model, tokenizer, prompts[i : i + 10]) for i in range(0, samples, 10)]
            right, ended = (sum(column) for column in zip(*scores, strict=True))
            line = f"{fact_count} facts, {prompt_tokens} tokens: {right}/{samples} exact, {ended} also end there"
            print(line, flush=True)
    for window in (512, 2048, 4096):
        perplexity, count = _perplexity(model, books, window)
        print(f"held-out perplexity, windows of {window}: {perplexity:.2f} per token ({count} tokens)", flush=True)
    inputs = wrapped("It was a dark night when the ship", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=160, do_sample=True, temperature=0.7, top_k=50)
    print(wrapped.decode(out[0]))
