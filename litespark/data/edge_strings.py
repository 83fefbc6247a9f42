"""Strings on which fast tokenizers are known to stumble.

Two implementations of one tokenizer agree on plain prose long before they agree on everything.
What parts them is runs of white space, characters that the vocabulary gives a meaning of its own
(U+2581 stands for a space inside pieces), bytes that no piece covers, very long words, and text
that looks like a control token.  `litespark.data.engine` compares the fast engine with the
reference on all of these before it is trusted.
"""

from __future__ import annotations

_WHITE_SPACE = (
    *(" " * count for count in (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 100)),
    *(f"a{' ' * count}b" for count in (2, 3, 5, 8, 13, 16, 40)),
    "  leading",
    "trailing  ",
    "trailing newline\n",
    "\n",
    "\n\n\n",
    "\r\n",
    "a\r\nb\rc\n",
    "\t",
    "\t\tx\t y",
    " \n \n ",
    "a \n\n  b",
    "x\u00a0y\u00a0\u00a0z",
    "\u2003\u3000wide",
    "\u2028line\u2029paragraph",
    "\x0b\x0c",
    "end with spaces and newline \n  ",
)
_MARKS_OF_THE_VOCABULARY = (
    "\u2581",
    "\u2581\u2581",
    " \u2581 ",
    "a\u2581b",
    "\u2581the the\u2581",
    "<0x41>",
    "<0x0A><0xFF>",
    "\u0120hello\u010aworld",
)
_CONTROL_TOKEN_TEXT = (
    "<s>",
    "</s>",
    "<unk>",
    "a</s>b",
    "<s> a </s>",
    "<s><s></s></s>",
    "[INST] x [/INST]",
    "<|endoftext|>",
    "a<|endoftext|>b",
    "<|begin_of_text|>x<|end_of_text|>",
    "<|im_start|>user\n<|im_end|>",
    "<pad><mask>",
)
_RARE_CHARACTERS = (
    "\0",
    "a\0b\0\0c",
    "\x01\x02\x7f",
    "\ufeff",
    "\ufeffbyte order mark",
    "a\ufeffb",
    "\ufffd\ufffe",
    "\u200b\u200c\u200d",
    "\ue000\uf8ff",
    "\U000f0000\U0010ffff",
    "\U0001f600",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 family",
    "\U0001f1e9\U0001f1ea\U0001f3f4\U000e0067\U000e0062\U000e007f",
    "e\u0301 \u00e9 a\u0308\u0323",
    "\u1e9b\u0323 \ufb01 \u2460 \u00bd",
    "z\u0310\u0311\u0312\u0313\u0314\u0315",
)
_SCRIPTS = (
    "\u4e2d\u6587\u5b57\u7b26\u4e0e English \u6df7\u5408",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3002",
    "\ud55c\uad6d\uc5b4 \uc870\ud569",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0643",
    "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440",
    "\U00020000\U0002a6d6",
    "\U00012000\U0001d11e",
)
_WORDS = (
    "a" * 20_000,
    "ab" * 2_000,
    "\u00e9" * 3_000,
    "\u4e2d" * 3_000,
    "=" * 300,
    "-" * 77 + "\n" + "#" * 41,
    "0123456789" * 20,
    "3.14159e-26, 1,234,567",
    "don't I'll WE'VE it'S",
    "camelCaseHTTPServer_snake_case",
    "https://example.org/a?b=c&d=%20#e",
    "if (x<=y && !z[0]) { return a->b; } // \u00fc",
    "\\u0041 \\n \\\\",
    "A",
    "The quick brown fox. The quick brown fox!",
)

EDGE_STRINGS: tuple[str, ...] = (
    "",
    *_WHITE_SPACE,
    *_MARKS_OF_THE_VOCABULARY,
    *_CONTROL_TOKEN_TEXT,
    *_RARE_CHARACTERS,
    *_SCRIPTS,
    *_WORDS,
)
