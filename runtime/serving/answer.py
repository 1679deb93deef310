"""One answer under way: a prompt that is read step by step, then token after token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator as Steps

import numpy as np

from edgekv.errors import EdgeKVError

from ..engines.base import Float
from ..generate import Generator
from ..options import answer_room
from ..sampling import Sampler
from ..text import TextStream
from .request import Deliver, Failed, Finished, FinishReason, Piece, Reading, Request, TokenFacts


class Answer:
    """Answers one request on one generator, a step at a time; tells of each.

    Attributes:
        writing: the prompt is read.
        over: nothing comes any more. ended: and the sequence is the prompt with all of its answer.
        token: the one to run next, while it writes.
    """

    def __init__(self, request: Request, prompt: list[int], generator: Generator, deliver: Deliver) -> None:
        self.writing = self.over = self.ended = False
        self.token = 0
        self._request = request
        self._prompt = prompt
        self._generator = generator
        self._deliver = deliver
        self._sampler = Sampler(request.sampling)
        self._stream = TextStream(generator.text, request.stop)
        self._context = generator.options.context or generator.manifest.model.max_context
        most = self._context if request.max_tokens is None else request.max_tokens
        self._room = answer_room(self._context, len(prompt), most)
        self._given: list[int] = []
        self._cached = 0
        self._steps: Steps[tuple[int, int], None, Float] = generator.reading(prompt, max_tokens=self._room)

    def read(self) -> None:
        """Read the next part of the prompt; with the last one, choose the first token."""
        try:
            done, total = next(self._steps)
        except EdgeKVError as error:
            self.fail(error)
            return
        self._cached = len(self._prompt) - total
        self._deliver(Reading(self._cached + done, len(self._prompt), self._cached))
        if done == total:
            self.writing = True
            self._generator.save()  # others that begin alike need not wait for the end
            self.take(self._logits())

    def _logits(self) -> Float:
        try:
            next(self._steps)
        except StopIteration as end:
            logits: Float = end.value
            return logits
        raise AssertionError("a prompt that is read has no further step")

    def write(self) -> None:
        """Run the token that was chosen last, and choose the next."""
        try:
            logits = self._generator.step([self.token])
        except EdgeKVError as error:
            self.fail(error)
            return
        self.take(logits)

    def take(self, logits: Float) -> None:
        """Choose the next token from logits [vocab_size], and tell of it."""
        request, constraint = self._request, self._request.constraint
        facts = logits
        logits = self._changed(logits)
        if not self._room:
            self._finish("length")
            return
        token = self._sampler.choose(logits, self._prompt + self._given)
        if token in self._generator.manifest.model.eos_token_ids:
            self._end_of_text("stop")
            return
        ended = constraint is not None and constraint.accept(token)
        self._given.append(token)
        text = self._stream.push(token)
        self._deliver(Piece(text, (self._facts(token, facts),)))
        if self._stream.stopped:
            self._finish("stop")
        elif ended:
            self._end_of_text("stop")
        elif len(self._given) == self._room or request.max_tokens == 0:
            self._end_of_text("length")
        else:
            self.token = token

    def cancel(self) -> None:
        """End here; what was computed stays in the cache."""
        if not self.over:
            self._steps.close()
            self._finish("cancelled")

    def fail(self, error: EdgeKVError) -> None:
        """End with an error."""
        self.over = True
        self._deliver(Failed(error))

    def _changed(self, logits: Float) -> Float:
        """Return the logits that the sampler chooses from."""
        request = self._request
        if (
            request.logit_bias
            or request.presence_penalty
            or request.frequency_penalty
            or request.constraint is not None
        ):
            logits = logits.copy()
        for token, bias in request.logit_bias.items():
            logits[token] += bias
        if request.presence_penalty or request.frequency_penalty:
            for token, count in Counter(self._given).items():
                logits[token] -= request.presence_penalty + count * request.frequency_penalty
        if request.constraint is not None:
            request.constraint.restrict(logits)
        return logits

    def _facts(self, token: int, logits: Float) -> TokenFacts:
        wanted = self._request.logprobs
        if wanted is None:
            return TokenFacts(token)
        scores = logits.astype(np.float64)
        scores -= scores.max()
        scores -= np.log(np.exp(scores).sum())
        likeliest = np.argsort(-scores, kind="stable")[:wanted].tolist()
        return TokenFacts(token, float(scores[token]), tuple((other, float(scores[other])) for other in likeliest))

    def _end_of_text(self, reason: FinishReason) -> None:
        rest = self._stream.flush()
        if rest:
            self._deliver(Piece(rest, ()))
        self._finish(reason)

    def _finish(self, reason: FinishReason) -> None:
        self.over = True
        generator, given = self._generator, self._given
        try:
            if self.writing:
                kept = [*self._prompt, *given]
                if self._stream.stopped:
                    kept = [*self._prompt, *given[: self._stream.n_before]]
                    kept = kept + generator.text.encode_behind(kept, self._stream.rest) if self._stream.rest else kept
                generator.go_back(kept)
                self.ended = True
            else:
                generator.save()
        except EdgeKVError as error:
            self._deliver(Failed(error))
            return
        seed = self._sampler.seed if self._request.sampling.temperature else None
        self._deliver(Finished(reason, len(self._prompt), self._cached, len(given), seed))
