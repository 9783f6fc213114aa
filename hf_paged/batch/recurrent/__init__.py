"""What recurrent layers keep of the tokens before: one state for each row, however long it is."""
