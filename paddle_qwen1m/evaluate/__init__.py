"""What a checkpoint keeps of long texts: RULER's tasks, a needle map, perplexity by position; asked, scored, shown."""
