"""Writes what llama.cpp makes of some texts, for tests/test_tokenizer.py.

    pip install llama-cpp-python
    python tools/make_token_data.py MODEL.gguf tests/data/tokens_NAME.json

Only the vocabulary of the model is read.
"""

import ctypes
import importlib
import importlib.metadata
import json
import sys
from typing import Any

# Only this script needs it, so a type checker may not find it: imported by name.
llama_cpp: Any = importlib.import_module("llama_cpp")

TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    "\t",
    "a",
    "Hello",
    " Hello",
    "Hello ",
    "  Hello  world  ",
    "Hello, world! How are you?",
    "The quick brown fox jumps over the lazy dog.",
    "I'll say we're done; they've won't can't I'm he'd it's",
    "I'LL SAY WE'RE DONE; THEY'VE WON'T",
    "don' t 's 're ''ll '",
    "0 1 12 123 1234 12345 123456 1234567890",
    "3.14159e-10 + 1,000,000 = 0x7fFF",
    "2024-02-29T23:59:59Z",
    "½ ² ³ Ⅷ ٣ ४ 〇 ①",
    "def f(x):\n    if x > 0:\n        return x ** 2\n    return None\n",
    "\tfor (int i = 0; i < n; ++i) {\n\t\tsum += a[i];\n\t}\n",
    '{"key": [1, 2.5, null, true], "s": "a\\nb"}',
    "<html><body><b>bold</b> and <i>italic</i></body></html>",
    "# Title\n\n- item 1\n- item 2\n\n```python\nprint('x')\n```\n",
    "https://example.com/a/b?c=d&e=%20#f",
    "$x^2 + y_1 = \\frac{a}{b}$",
    "a==b!=c<=d>=e&&f||g->h::i",
    "----------======......____",
    "   leading spaces",
    "trailing spaces   ",
    "a  b   c    d     e",
    "a" + " " * 33 + "b",
    "a" + " " * 70,
    "a\nb\n\nc\n\n\nd\n\n\n\n",
    "\n" * 40 + "x",
    "\r\n\r\nwindows\r\nlines\r",
    " \n \n  \n\t\n x",
    "\t\t\ttabs\tand \t spaces",
    "no\u00a0break \u2003em \u3000wide \u2028line \u0085next",
    "zero\u200bwidth\u200djoiner\ufeffmark",
    "café naïve Ångström ÉCOLE straße ĲSSEL",
    "cafe\u0301 nai\u0308ve A\u030angstro\u0308m e\u0301\u0302\u0323",
    "Z̸̢̛͙͓͈a̵͎̾l̶̰̈́g̴̱̈o̷̠͒",
    "Привет, мир! Ёлка съела ёжика.",
    "Γειά σου Κόσμε",
    "你好，世界！今天天气怎么样？",
    "こんにちは世界。カタカナとひらがな、漢字。",
    "안녕하세요 세계! 한국어 문장입니다.",
    "مرحبا بالعالم! كيف حالك؟ ١٢٣",
    "שלום עולם! מה שלומך?",
    "नमस्ते दुनिया क्षत्रिय १२३",
    "สวัสดีชาวโลก ภาษาไทย",
    "😀😃 🎉🎊 ok👍🏽",
    "👨‍👩‍👧‍👦 🏳️‍🌈 👩🏽‍🚀 ❤️",
    "🇫🇷🇩🇪🇯🇵 flags🇺🇸",
    "𝐀𝕏𝔘 𠀀𪜀 𓀀 𐍈",
    "\u2581 \u2581\u2581 lower block",
    "ſ K ı İ ǅ ﬁ",
    "\x01\x02 \x1b[0m \x7f",
    "\U0010fffd \ue000 \uffff \U00040000!\x04!",
    "!\x04!\x06!! a\x13b",
    "a" * 300,
    "ab" * 200,
    "=" * 257,
    "word " * 100,
    "\U0001f600" * 40,
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "a <|endoftext|> b<|endoftext|><|endoftext|>c",
    "<|im_start|",
    "x<|im_end|>> <<|im_end|>",
    "<start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\n",
    "<bos>a<eos> <bos> b <unk><pad><mask>",
    "<unused12> <unused6241><table>\n\n<tr> [multimodal]",
    "<0x41><0x0A> <s> [INST]",
]


def load(path):
    """The model whose vocabulary is asked, read without its weights."""
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(0), ctypes.c_void_p(0))
    if not model:
        raise SystemExit(f"llama.cpp cannot read {path}.")
    return model


def tokenize(vocab, text, *, add_special, parse_special):
    """The ids llama.cpp gives a text; names are llama.cpp's."""
    data = text.encode()
    capacity = 2 * len(data) + 16
    ids = (llama_cpp.llama_token * capacity)()
    count = llama_cpp.llama_tokenize(
        vocab, data, len(data), ids, capacity, add_special, parse_special
    )
    return list(ids[:count])


def main(path, out):
    """Writes one line of JSON per text, so that a change shows as a line."""
    model = load(path)
    vocab = llama_cpp.llama_model_get_vocab(model)
    rows = [
        {
            "text": text,
            "special": tokenize(vocab, text, add_special=False, parse_special=True),
            "plain": tokenize(vocab, text, add_special=False, parse_special=False),
            "default": tokenize(vocab, text, add_special=True, parse_special=True),
        }
        for text in TEXTS
    ]
    size = llama_cpp.llama_vocab_n_tokens(vocab)
    stops = [id for id in range(size) if llama_cpp.llama_vocab_is_eog(vocab, id)]
    version = importlib.metadata.version("llama-cpp-python")
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    with open(out, "w") as file:
        file.write(f'{{"made_by": "llama-cpp-python {version}",\n"stops": {stops},\n')
        file.write(f'"rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main(*sys.argv[1:])
