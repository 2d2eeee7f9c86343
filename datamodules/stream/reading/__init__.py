"""Bytes of samples: from files, HTTP servers, pipes and stores, and out of a tar."""
