"""Text <-> token ids, built from a GGUF file's metadata alone.

Three words. A *token* is one entry of the vocabulary, an *id* is its place there, and a
*piece* is the bytes a token stands for. Bytes, not text: both kinds of vocabulary may
spread one character over several tokens.

The metadata keys are those of the GGUF specification (github.com/ggml-org/ggml,
docs/gguf.md). Where that is silent, llama.cpp's reading of a file decides, because
files are made to agree with it: the split patterns behind a name, the merge order behind
scores, what is cut out of a text first, which tokens end a turn. The merging itself is
done by the `tokenizers` library.
"""

import codecs
import dataclasses
import enum
import functools
import re
import warnings
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

from .._core.errors import choices
from ..io.fields import Fields
from .chat_template import check_messages, render
from .plain_text import PlainText
from .splits import ADD_BOS, SPLITS, TAKE_WORDS


class Kind(enum.IntEnum):
    """What a token is for: ``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # found in a text only where the caller trusts it
    USER_DEFINED = 4  # found in any text
    UNUSED = 5
    BYTE = 6  # "<0x0A>": one byte of a character the vocabulary lacks


_CONTROL = (Kind.CONTROL, Kind.UNKNOWN)
_WHOLE = (*_CONTROL, Kind.USER_DEFINED)  # cut out of a text before anything is merged


# Tokens that end a turn whatever the metadata says: it names one of them at most, and
# chat models end with another. The last two lines end a fill-in-the-middle.
_STOPS = """
    <|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|>
    <end_of_turn> <|endoftext|> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|>
    <end_of_utterance> <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~[ </s>
    <|fim_pad|> <fim-pad> <fim_pad> <|fim_repo|> <|repo_name|> <fim-repo> <REPO>
    <reponame> <|file_sep|>
"""
_BYTE = "<0x[0-9A-Fa-f]{2}>"
_STOP_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
_NAMED = ("bos", "unknown", "padding", *_STOP_KEYS)

# Fields whose default is all that is done here.
_NEUTRAL = {
    "add_sep_token": (False,),
    "remove_extra_whitespaces": (False,),
    "escape_whitespaces": (True,),
    "normalizer.lowercase": (False,),
    "precompiled_charsmap": ([],),
}
# Fields that change no id and no text here, and why.
_IGNORED = {
    **dict.fromkeys(
        ("cls_token_id", "seperator_token_id", "mask_token_id", "token_type_count"),
        "of BERT's two segments, which are not made here",
    ),
    **dict.fromkeys(
        (
            *("fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id"),
            *("prefix_token_id", "suffix_token_id", "middle_token_id"),
        ),
        "of fill-in-the-middle prompts, which are not written here",
    ),
}
_MAX_TOKEN = 1024  # letters: ways to halve tokens are listed, which takes its square


@dataclasses.dataclass(frozen=True)
class _Model:
    """What differs between the kinds of vocabulary."""

    merge: tokenizers.Tokenizer
    piece: Callable[[str], bytes]  # of a normal token
    escape: Callable[[str], str] = lambda text: text
    prefix: str = ""  # put before a text, and after every token found in it
    add_bos: bool = False
    special: Mapping[str, int] = dataclasses.field(default_factory=dict)


class Tokenizer:
    """Turns text into ids and back.

    Attributes:
        vocab_size: How many tokens there are.
        bos_id, eos_id: The tokens that open and close a text, or None.
        stop_ids: Every token after which a model has no more to say: the end of text,
            of a turn, of a message; named by the metadata or known by their spelling.
    """

    def __init__(
        self,
        *,
        tokens: Sequence[str],
        kinds: Sequence[int],
        model: _Model,
        fields: Fields,
        template: str | None,
    ):
        def of(name: str) -> int | None:
            return _token_id(fields, name, model.special.get(name), len(tokens))

        self._tokens, self._kinds, self._model = tokens, kinds, model
        self.vocab_size = len(tokens)
        self.bos_id: int | None = of("bos")
        self.eos_id: int | None = of("eos")
        self.stop_ids = _stop_ids(tokens, kinds, map(of, _STOP_KEYS))
        self._add_bos: bool = fields.flag("add_bos_token", model.add_bos)
        self._add_eos: bool = fields.flag("add_eos_token", False)
        self._template = template
        named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        self._names = {
            f"{short}_token": tokens[id]
            for short, name in named.items()
            if (id := of(name)) is not None
        }
        self._found = [  # llama.cpp looks for the longest first, wherever they are
            (token, id, kind in _CONTROL)
            for id, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in _WHOLE
        ]
        self._found.sort(key=lambda found: -len(found[0].encode()))

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any]) -> "Tokenizer":
        """Reads the ``tokenizer.*`` keys of a GGUF file.

        Args:
            fields: Every key of the file's metadata, as plain Python values.

        Raises:
            ValueError: The tokenizer model or its pre-tokenizer is not one of those
                known here, a key is missing or of another type, or one is unknown or
                asks for what is not done here. The message names the key.
        """
        known = Fields(fields, "tokenizer.ggml.")
        known.ignore(*_IGNORED)
        for name, allowed in _NEUTRAL.items():
            known.neutral(name, allowed)
        tokenizer = cls._from(known, Fields(fields, "tokenizer."))
        known.refuse_the_rest()
        return tokenizer

    @classmethod
    def _from(cls, fields: Fields, above: Fields) -> "Tokenizer":
        name = fields.text("model")
        if name not in _MODELS:
            raise ValueError(
                f"tokenizer.ggml.model={name!r} is not one of {choices(_MODELS)}."
            )
        # An empty entry could match anywhere; give it the name llama.cpp gives it.
        named = enumerate(fields.texts("tokens"))
        tokens = [token or f"[EMPTY_{id}]" for id, token in named]
        vocab = {token: id for id, token in enumerate(tokens)}
        if len(vocab) != len(tokens):
            twice = next(t for id, t in enumerate(tokens) if vocab[t] != id)
            raise ValueError(f"tokenizer.ggml.tokens has {twice!r} twice.")
        kinds = fields.integers("token_type", 0, max(Kind), None)
        if kinds is None:
            kinds = _guessed_kinds(fields, tokens)
        _check_length("token_type", kinds, vocab)
        _check_bytes(tokens, kinds)
        return cls(
            tokens=tokens,
            kinds=kinds,
            model=_MODELS[name](fields, vocab),
            fields=fields,
            template=above.text("chat_template", None),
        )

    def encode(
        self,
        text: str,
        *,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
        special: bool = True,
    ) -> list[int]:
        """The ids of a text.

        A byte that neither the vocabulary nor its byte tokens can spell is left out:
        SmolLM2 has no token for some control characters, for example.

        Args:
            text: Any text. A text that `chat` made usually opens with the token that
                ``add_bos`` adds, and may hold a message that spells a control token:
                `encode_chat` takes care of both.
            add_bos, add_eos: Whether to put `bos_id` first and `eos_id` last. None
                means what the metadata says.
            special: Whether the spelling of a control token means that token. Pass
                False for text that is not to be trusted. User-defined tokens are found
                either way.

        Raises:
            ValueError: It is no text or has a lone surrogate, or an id is asked for
                that the metadata does not name.
        """
        _check_text(text)
        ids = self._bracket("bos", self.bos_id, self._add_bos, add_bos)
        ids += self._ids(self._cut(text, special))
        return ids + self._bracket("eos", self.eos_id, self._add_eos, add_eos)

    def _ids(self, parts: Iterable[str | int]) -> Iterator[int]:
        for part in parts:
            if isinstance(part, int):
                yield part
                continue
            words = self._model.escape(self._model.prefix + part)
            merged = self._model.merge.encode(words, add_special_tokens=False).ids
            yield from (id for id in merged if id < self.vocab_size)

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of some ids; bytes that are not UTF-8 become U+FFFD.

        Gives back what `encode` was given, except that a SentencePiece vocabulary
        writes a space as U+2581, so that character comes back as a space.

        Args:
            ids: Tokens, from the start of a text.
            skip_special: Leave out control and unknown tokens.
        """
        stream = self.stream(skip_special=skip_special)
        return "".join(map(stream.push, ids)) + stream.finish()

    def stream(
        self, prompt: Iterable[int] = (), *, skip_special: bool = False
    ) -> "Stream":
        """Decodes ids one at a time, as a model produces them after ``prompt``."""
        stream = Stream(self, skip_special)
        for id in prompt:
            stream.push(id)
        return stream

    def piece(self, id: int) -> bytes:
        """The bytes a token stands for; none for a token the model does not use."""
        _check_id(id, self.vocab_size)
        token, kind = self._tokens[id], self._kinds[id]
        if kind == Kind.NORMAL:
            return self._model.piece(token)
        if kind == Kind.BYTE:
            return bytes([int(token[3:5], 16)])  # <0x0A>
        return token.encode() if kind in _WHOLE else b""

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Writes a conversation the way the model was trained to read it.

        Args:
            messages: Mostly ``{"role": "user", "content": "..."}``; the model's
                template decides what is allowed.
            add_generation_prompt: End with the opening of the model's own turn.
            variables: Other names the template knows, ``tools`` for example.

        Raises:
            ValueError: The file has no template, or the template refuses, fails, or
                takes more than `raptax.models.chat_template` allows.
        """
        if self._template is None:
            raise ValueError(
                "this model has no chat template (tokenizer.chat_template); "
                "give it plain text, or use its instruction-tuned version."
            )
        names = {"tools": None, "documents": None, **self._names, **(variables or {})}
        names["add_generation_prompt"] = add_generation_prompt
        return render(self._template, messages, names)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        variables: Mapping[str, Any] | None = None,
        special: bool = False,
    ) -> list[int]:
        """The ids of what `chat` writes, with `bos_id` first once, if at all.

        Args:
            messages, add_generation_prompt, variables: As `chat` takes them.
            special: Whether messages and variables may spell control tokens. Else only
                the template's own text makes them, so that a message which holds
                ``<|im_end|>``, say, does not end its own turn.

        Raises:
            ValueError: See `chat` and `encode`.
        """
        check_messages(messages)
        if special:
            text = self.chat(messages, add_generation_prompt, variables=variables)
            _check_text(text)
            ids = list(self._ids(self._cut(text, True)))
        else:
            plain = PlainText(self._control, [messages, variables, self._template])
            messages, variables = plain.mark(messages), plain.mark(variables)
            text = self.chat(messages, add_generation_prompt, variables=variables)
            _check_text(text)
            text = plain.rendered(text)
            parts = self._cut(text, True, unless_after=plain.character)
            ids = list(self._ids(plain.unmark(parts)))
        opened = ids[:1] == [self.bos_id]
        add_bos = self._add_bos and not opened
        return [*self._bracket("bos", self.bos_id, add_bos, None), *ids]

    @functools.cached_property
    def _control(self) -> list[str]:
        return [token for token, _, control in self._found if control]

    def _bracket(self, name, id, default, asked):
        if not (default if asked is None else asked):
            return []
        if id is None:
            raise ValueError(
                f"add_{name} needs tokenizer.ggml.{name}_token_id, and the metadata "
                f"has none; pass add_{name}=False."
            )
        return [id]

    def _cut(
        self, text: str, special: bool, *, unless_after: str = ""
    ) -> list[str | int]:
        """The ids of tokens that are spelled in a text, and the text between them.

        Control tokens count only where ``special`` says so, and those of one letter do
        not right behind the character ``unless_after``.
        """
        parts: list[str | int] = [text] if text else []
        for token, id, control in self._found:
            if (special or not control) and token in text:
                guarded = control and unless_after and len(token) == 1
                before = f"(?<!{unless_after})" if guarded else ""
                spelled = re.compile(before + re.escape(token))
                parts = [new for part in parts for new in _cut_one(part, spelled, id)]
        return parts


class Stream:
    """Decodes ids one at a time; never gives out part of a character.

    What `push` and `finish` return joins to what `Tokenizer.decode` returns.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool):
        self._tokenizer = tokenizer
        self._skip = _CONTROL if skip_special else ()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._prefix = tokenizer._model.prefix.encode()  # still to be taken off

    def push(self, id: int) -> str:
        """The text that became certain with this token; often one word, maybe none."""
        piece, kind = self._tokenizer.piece(id), self._tokenizer._kinds[id]
        if kind in _WHOLE:
            self._prefix = self._tokenizer._model.prefix.encode()
        else:
            piece, self._prefix = piece.removeprefix(self._prefix), b""
        return self._utf8.decode(b"" if kind in self._skip else piece)

    def finish(self) -> str:
        """U+FFFD if the last character was not finished, else nothing."""
        return self._utf8.decode(b"", final=True)


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"text must be a str; got {type(text).__name__}.")
    if found := re.search("[\ud800-\udfff]", text):
        raise ValueError(
            f"the text has a lone surrogate at {found.start()}, {found[0]!r}, which is "
            "half a character; was it decoded with errors='surrogateescape'?"
        )


def _check_length(name: str, values: Sequence[Any], tokens: Collection[str]) -> None:
    if len(values) != len(tokens):
        raise ValueError(
            f"tokenizer.ggml.{name} has {len(values)} entries for {len(tokens)} tokens."
        )


def _guessed_kinds(fields: Fields, tokens: Sequence[str]) -> list[int]:
    """What tokens are for, by their names: some old files do not say."""
    _warn("token_type", "control tokens are guessed by their names")
    named = (_token_id(fields, name, None, len(tokens)) for name in _NAMED)
    control = {tokens[id] for id in named if id is not None} | set(_STOPS.split())

    def kind(token: str) -> Kind:
        if token in control:
            return Kind.CONTROL
        return Kind.BYTE if re.fullmatch(_BYTE, token) else Kind.NORMAL

    return [kind(token) for token in tokens]


def _warn(name: str, instead: str) -> None:
    warnings.warn(
        f"tokenizer.ggml.{name} is missing; {instead}, which may give other ids than "
        "the model was trained on. A newer conversion of the model has it.",
        stacklevel=2,
    )


def _check_bytes(tokens: Sequence[str], kinds: Sequence[int]) -> None:
    for token, kind in zip(tokens, kinds, strict=True):
        if kind == Kind.BYTE and not re.fullmatch(_BYTE, token):
            raise ValueError(
                f"tokenizer.ggml.tokens has {token!r}, whose type is byte; such a token "
                "is written like '<0x0A>'."
            )


def _check_id(id, size, name="id"):
    if not isinstance(id, int) or not 0 <= id < size:
        raise ValueError(f"{name}={id} is not in the vocabulary of {size} tokens.")


def _token_id(fields: Fields, name: str, default: int | None, size: int) -> int | None:
    """A token that the metadata names; all ones, a C program's -1, means none."""
    id = fields.integer(f"{name}_token_id", -1, 2**32 - 1, default)
    if id in (None, -1, 2**32 - 1):
        return None
    _check_id(id, size, f"tokenizer.ggml.{name}_token_id")
    return int(id)


def _cut_one(part: str | int, spelled: re.Pattern[str], id: int) -> list[str | int]:
    if isinstance(part, int):
        return [part]
    between = [[text, id] if text else [id] for text in spelled.split(part)]
    return [new for group in between for new in group][:-1]


def _stop_ids(tokens, kinds, named: Iterable[int | None]) -> frozenset[int]:
    known = frozenset(_STOPS.split())
    stops = {token: id for id, token in enumerate(tokens) if token in known}
    # Where it is no control token, </s> closes struck-through text (Gemma 3). llama.cpp
    # takes it for an end there too, and for a control token in `special=False` text.
    if "</s>" in stops and kinds[stops["</s>"]] != Kind.CONTROL:
        del stops["</s>"]
    # With these two present, <|end|> ends a message but not the turn (gpt-oss, Solar).
    if {"<|return|>", "<|call|>"} <= stops.keys() or (
        {"<|flush|>", "<|calls|>"} <= stops.keys()
    ):
        stops.pop("<|end|>", None)
    return frozenset(stops.values()) | {id for id in named if id is not None}


# Byte-level vocabularies


@functools.cache
def _byte_of() -> dict[str, int]:
    """The printable stand-ins for bytes that GPT-2 introduced, and what they mean.

    Bytes that print stand for themselves; the others follow from U+0100 on.
    Radford et al. 2019, https://github.com/openai/gpt-2, encoder.py.
    """
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in prints]
    return {chr(b): b for b in prints} | {chr(256 + n): b for n, b in enumerate(others)}


def _byte_level_piece(token: str) -> bytes:
    table = _byte_of()
    return b"".join(bytes([table[c]]) if c in table else c.encode() for c in token)


def _byte_level(fields: Fields, vocab: dict[str, int]) -> _Model:
    fields.ignore("scores")  # of SentencePiece; some converters write zeros
    if (name := fields.text("pre", None)) is None:
        name = "default"
        _warn("pre", "text is cut into words as llama.cpp's 'default' does it")
    if name not in SPLITS:
        raise ValueError(
            f"tokenizer.ggml.pre={name!r} is not one of {choices(sorted(SPLITS))}."
        )
    if fields.flag("add_space_prefix", False):
        raise ValueError(
            "tokenizer.ggml.add_space_prefix has no agreed meaning for a byte-level "
            "vocabulary."
        )
    merges = [tuple(pair.split(" ")) for pair in fields.texts("merges")]
    for pair in merges:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise ValueError(
                f"tokenizer.ggml.merges has {' '.join(pair)!r}, which does not join two "
                "tokens into a third."
            )
    # A byte without a token must still keep its neighbours apart while they merge, so
    # it gets an id past the end, and `encode` leaves that out.
    lacks = _byte_of().keys() - vocab.keys()
    vocab = vocab | {byte: len(vocab) + n for n, byte in enumerate(lacks)}
    bpe = models.BPE(vocab=vocab, merges=merges, ignore_merges=name in TAKE_WORDS)
    merge = tokenizers.Tokenizer(bpe)
    cuts = [
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        for pattern in SPLITS[name]
    ]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merge.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    return _Model(merge, _byte_level_piece, add_bos=name in ADD_BOS)


# SentencePiece vocabularies. Kudo & Richardson 2018, arXiv:1808.06226.


def _merges_from_scores(
    vocab: Iterable[str], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, the third with the best score first.

    SentencePiece merges the pair that makes the best token, leftmost first; a table of
    merges ranks pairs. So pairs that make the same token stand together; their order
    would matter only if they could overlap, which 90,000 random cases never did.

    Two tokens of one score merge in the order of their ids instead, as a table cannot
    say more. The vocabularies seen so far have no two normal tokens like that.
    """
    tokens = list(vocab)
    known = set(tokens)
    merges: list[tuple[str, str]] = []
    for id in sorted(range(len(tokens)), key=lambda id: -scores[id]):
        token = tokens[id]
        halves = ((token[:at], token[at:]) for at in range(1, len(token)))
        merges += (pair for pair in halves if pair[0] in known and pair[1] in known)
    return merges


def _sentencepiece(fields: Fields, vocab: dict[str, int]) -> _Model:
    fields.ignore("pre", "merges")  # of byte-level vocabularies
    lacks = {f"<0x{byte:02X}>" for byte in range(256)} - vocab.keys()
    if lacks:
        raise ValueError(f"tokenizer.ggml.tokens lacks the byte token {min(lacks)!r}.")
    if len(longest := max(vocab, key=len)) > _MAX_TOKEN:
        raise ValueError(
            f"tokenizer.ggml.tokens has a token of {len(longest)} letters, over "
            f"{_MAX_TOKEN}, which begins with {longest[:20]!r}."
        )
    scores = fields.numbers("scores")
    _check_length("scores", scores, vocab)
    merges = _merges_from_scores(vocab, scores)
    bpe = models.BPE(vocab=vocab, merges=merges, byte_fallback=True)
    return _Model(
        tokenizers.Tokenizer(bpe),
        lambda token: token.replace("\u2581", " ").encode(),
        escape=lambda text: text.replace(" ", "\u2581"),
        prefix=" " if fields.flag("add_space_prefix", True) else "",
        add_bos=True,
        special={"bos": 1, "eos": 2, "unknown": 0},
    )


_MODELS = {"gpt2": _byte_level, "llama": _sentencepiece}
