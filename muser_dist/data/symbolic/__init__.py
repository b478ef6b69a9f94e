"""Notation as patches of characters: ABC, MIDI and MusicXML, after CLaMP 2 (arXiv 2410.13267)."""
