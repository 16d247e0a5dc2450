"""Training on preferences: TRL's DPO, KTO and reward trainers with veneer's models."""
