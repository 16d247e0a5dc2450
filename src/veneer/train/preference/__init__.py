"""Training on preferences and rewards: TRL's DPO, KTO, GRPO, RLOO and reward trainers with veneer's models."""
