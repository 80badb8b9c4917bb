"""Texts, chats and tokens, from wherever they are to windows of tokens."""
