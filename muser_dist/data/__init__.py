"""From tar shards to numbered chunks of waveforms and token ids."""
