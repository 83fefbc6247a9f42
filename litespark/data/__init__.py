"""Text -> indexed shards -> batches.

    .jsonl[.zst|.gz] --readers--> text --tokenizers--> token ids --indexed--> .bin, .idx, .json
    .bin, .idx --corpus--> shuffled samples --blend--> one stream --loader--> a rank's batches

The upper line runs once, ahead of training (`preprocess`).  The lower line keeps no state but a
number: sample k is a pure function of the shards, the weights, the seed and k, so a run resumes
at any layout from the count of consumed samples alone.
"""
