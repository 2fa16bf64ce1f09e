package main

import (
	"context"
	"log/slog"
	"os"
	"runtime"
	"syscall"
	"time"
)

// threads gives Go as many threads as the load needs, between one and what the machine, or the container's limit, has. With more, Go
// keeps looking for work on each of them, which costs a proxy that has little to do a third of its CPU.
type threads struct {
	limit, n int
	quiet    int // looks in succession at which fewer would have done
}

const (
	lookEvery = 100 * time.Millisecond
	quietFor  = 50 // looks

	idle    = 0.02 // of a CPU
	idleFor = 50   // looks, before memory is trimmed
)

// newThreads takes over from Go, unless the environment has decided.
func newThreads() *threads {
	t := &threads{limit: runtime.GOMAXPROCS(0)}
	if t.n = t.limit; os.Getenv("GOMAXPROCS") == "" {
		t.n = 1
		runtime.GOMAXPROCS(1)
	} else {
		t.limit = t.n // nothing to decide
	}
	return t
}

// next decides after a time in which so many CPUs were used.
func (t *threads) next(busy float64) int {
	switch n := float64(t.n); {
	case busy > 0.6*n && t.n < t.limit:
		t.n, t.quiet = min(t.limit, t.n+(t.n+1)/2), 0
	case t.n == 1 || busy > 0.4*(n-1):
		t.quiet = 0
	default:
		if t.quiet++; t.quiet == quietFor {
			t.n, t.quiet = t.n-1, 0
		}
	}
	return t.n
}

// run looks at the load until ctx ends. It also trims memory when the load is over.
func (t *threads) run(ctx context.Context, log *slog.Logger) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	used, at := cpuTime(), time.Now()
	for rest := 0; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		usedNow, now := cpuTime(), time.Now()
		before, busy := t.n, (usedNow-used).Seconds()/now.Sub(at).Seconds()
		if n := t.next(busy); n != before {
			runtime.GOMAXPROCS(n)
			log.Debug("threads", "from", before, "to", n, "limit", t.limit)
		}
		if busy > idle {
			rest = 0
		} else if rest++; rest == idleFor { // once after each busy time
			if err := trim(); err != nil {
				log.Debug("memory is not trimmed", "error", err)
			}
			usedNow, now = cpuTime(), time.Now() // that was no work
		}
		used, at = usedNow, now
	}
}

// cpuTime is what this process has used.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
