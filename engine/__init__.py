"""One model replica: token ids in, token ids and KV blocks out. Has no network and no tokenizer."""
