"""`aria-train data prepare`, `concatenate` and `inspect`: from files of many kinds to corpora, all or nothing."""
