"""How byte-level vocabularies cut a text into words: ``tokenizer.ggml.pre``.

Patterns are llama.cpp's (``src/llama-vocab.cpp``, ``src/unicode.cpp``), as regular
expressions of Oniguruma, which the `tokenizers` library uses.
"""


def _words(letters: str, digits: str, symbols: str) -> str:
    """What the patterns since GPT-4 have in common; spaces come last, as the rest."""
    return rf"{letters}|{digits}| ?{symbols}|\s*[\r\n]+|\s+(?!\S)|\s+"


# `(?i:'s)` would also take the long s, U+017F.
_SUFFIX = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_LETTERS = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKED = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_SYMBOLS = r"[^\s\p{L}\p{N}]+[\r\n]*"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _words(_LETTERS, r"\p{N}{1,3}", _SYMBOLS)
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Letters that were written into the pattern one range after another.
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293"
    "\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a"
    "\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-"
    "\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-"
    "\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-"
    "\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-"
    "\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-"
    "\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d"
    "\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f"
    "\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-"
    "\U0001e943"
)
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_UPPER, _LOWER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# How a byte-level vocabulary cuts a text into words; merges stay inside a word. Each
# pattern cuts what the ones before it left whole. `tokenizer.ggml.pre` is a name here.
# A letter is what it is in the Unicode version `tokenizers` was built with; llama.cpp's
# is older, so ids may differ around characters added since Unicode 16.
_LLAMA3_NAMES = "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2"
_PATTERNS = {
    "gpt-2 phi-2 mpt olmo jais gigachat exaone4 trillion mellum": (_GPT2,),
    "smollm starcoder refact command-r codeshell exaone minerva-7b": (r"\p{N}", _GPT2),
    _LLAMA3_NAMES: (_LLAMA3,),
    "dbrx smaug-bpe chatglm-bpe": (_LLAMA3,),
    "qwen2 deepseek-r1-qwen stablelm2 hunyuan solar-open megrez grok-2": (
        _words(_LETTERS, r"\p{N}", _SYMBOLS),
    ),
    "qwen35": (_words(_MARKED, r"\p{N}", r"[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),),
    "seed-coder": (_words(_LETTERS, r"\p{N}", r"[^\s\p{L}\p{N}\r\n]+"),),
    "deepseek-v3 hunyuan-dense joyai-llm": (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        _DEEPSEEK3,
    ),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "tekken": (_TEKKEN,),
    "viking": (" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+", r"\p{N}"),
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?[{_DEEPSEEK_LETTERS}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        _DEEPSEEK_CJK,
        r"\p{N}+",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}"),
    "chameleon": (
        "<sentinel:[0-9]+>",
        "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
        r"([\t\n]|    |  )",
        r"\p{N}",
        r"[\p{P}!-/:-@\[-`{-~]",
        _GPT2,
    ),
}
SPLITS = {name: split for names, split in _PATTERNS.items() for name in names.split()}

# These take a word that is itself a token, even where no merges lead to it.
TAKE_WORDS = frozenset((*_LLAMA3_NAMES.split(), "tekken"))
# These put the beginning-of-text token first unless the metadata says otherwise.
ADD_BOS = TAKE_WORDS | {"chameleon"}
