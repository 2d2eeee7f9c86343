"""Reads the bytes of samples from files, HTTP servers, pipes and stores, and unpacks tars."""
