"""One step of the decoder, in either form."""
