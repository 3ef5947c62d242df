"""One model replica: token ids in, token ids and KV blocks out. Knows no network and no tokenizer."""
