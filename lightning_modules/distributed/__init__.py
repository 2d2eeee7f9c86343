"""Shares one model among ranks: FSDP2, tensor parallel, gathering."""
