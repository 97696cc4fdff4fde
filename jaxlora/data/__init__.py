"""F3: rows from files and the hub, tokens and what to train on, packing, batches.

The order of a run: `sources` (rows with their origin) -> `prompts` or `chat` (rows to drafts) ->
`encode` (drafts to token ids and a trained mask) -> `table` in `cache` -> `packing` -> `batches`.
`prepare.prepare` does it all but the last step.
"""
