"""A pool of workers that serves live streams: gateway, pool, workers, the state that outlives them."""
