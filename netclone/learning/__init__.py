"""Everything that is learned from samples: masks, refits, distillation, adapters. And the samples themselves."""
