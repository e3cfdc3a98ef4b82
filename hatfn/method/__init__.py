"""The equations of the papers: gates, masks, schedule, sparsity, protection, the loss."""
