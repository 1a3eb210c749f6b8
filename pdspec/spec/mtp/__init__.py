"""MTP (DeepSeek-V3, 2412.19437): modules in series, each one decoder layer that predicts one token further ahead."""
