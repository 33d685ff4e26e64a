"""What some cache methods learn from text: which it is (`needs`), how it is found (`calibrate`), where it is kept
(`store`)."""
