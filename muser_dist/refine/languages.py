"""The languages that descriptions may be written in, and the script of a text.

They are those of XLM-R (Conneau et al. 2020, appendix A) but for its romanised variants: the text encoder of CLaMP 2
has read them all.
"""

import unicodedata
from collections import Counter

_BY_SCRIPT = {
    "LATIN": """
        af Afrikaans, az Azerbaijani, br Breton, bs Bosnian, ca Catalan, cs Czech, cy Welsh, da Danish, de German,
        en English, eo Esperanto, es Spanish, et Estonian, eu Basque, fi Finnish, fr French, fy Frisian, ga Irish,
        gd Scottish Gaelic, gl Galician, ha Hausa, hr Croatian, hu Hungarian, id Indonesian, is Icelandic, it Italian,
        jv Javanese, ku Kurdish, la Latin, lt Lithuanian, lv Latvian, mg Malagasy, ms Malay, nl Dutch, no Norwegian,
        om Oromo, pl Polish, pt Portuguese, ro Romanian, sk Slovak, sl Slovenian, so Somali, sq Albanian, su Sundanese,
        sv Swedish, sw Swahili, tl Filipino, tr Turkish, uz Uzbek, vi Vietnamese, xh Xhosa""",
    "CYRILLIC": """
        be Belarusian, bg Bulgarian, kk Kazakh, ky Kyrgyz, mk Macedonian, mn Mongolian, ru Russian, uk Ukrainian""",
    "CYRILLIC LATIN": "sr Serbian",
    "ARABIC": "ar Arabic, fa Persian, ps Pashto, sd Sindhi, ug Uyghur, ur Urdu",
    "DEVANAGARI": "hi Hindi, mr Marathi, ne Nepali, sa Sanskrit",
    "BENGALI": "as Assamese, bn Bengali",
    "HEBREW": "he Hebrew, yi Yiddish",
    "CJK": "zh Chinese",
    "CJK HIRAGANA KATAKANA KATAKANA-HIRAGANA": "ja Japanese",
    "HANGUL": "ko Korean",
    "GREEK": "el Greek",
    "ARMENIAN": "hy Armenian",
    "GEORGIAN": "ka Georgian",
    "ETHIOPIC": "am Amharic",
    "GURMUKHI": "pa Punjabi",
    "GUJARATI": "gu Gujarati",
    "ORIYA": "or Oriya",
    "TAMIL": "ta Tamil",
    "TELUGU": "te Telugu",
    "KANNADA": "kn Kannada",
    "MALAYALAM": "ml Malayalam",
    "SINHALA": "si Sinhala",
    "THAI": "th Thai",
    "LAO": "lo Lao",
    "MYANMAR": "my Burmese",
    "KHMER": "km Khmer",
}

_LANGUAGES = [
    (code, name, frozenset(scripts.split()))
    for scripts, entries in _BY_SCRIPT.items()
    for code, _, name in (entry.strip().partition(" ") for entry in entries.split(","))
]

NAMES: dict[str, str] = {code: name for code, name, _ in sorted(_LANGUAGES)}
"""English names by ISO 639-1 code ("tl" is Filipino, as XLM-R has it)."""

_SCRIPTS = {code: scripts for code, _, scripts in _LANGUAGES}


def script_share(text: str, language: str) -> float:
    """Share of a text's letters that are of a script in which the language is written; 0 where it has no letter.

    A letter's script is the first word of its Unicode name, which is how the standard names letters.
    """
    letters = Counter(unicodedata.name(letter, "").partition(" ")[0] for letter in text if letter.isalpha())
    return sum(letters[script] for script in _SCRIPTS[language]) / max(1, letters.total())
