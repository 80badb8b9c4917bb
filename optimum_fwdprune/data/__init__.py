"""Reading texts, chats and token ids from any source, and cutting them into windows of tokens."""
