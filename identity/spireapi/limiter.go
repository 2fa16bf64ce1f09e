package spireapi

import (
	"sync"
	"time"
)

// limiter is a token bucket per source address. It remembers at most maxSources; beyond that, all new ones share one.
type limiter struct {
	// read-only
	rate  float64 // per second
	burst float64
	now   func() time.Time

	mu       sync.Mutex
	buckets  map[string]*bucket // guarded by mu
	promised time.Time          // guarded by mu; the last time that somebody was told to come back at
}

type bucket struct {
	level float64
	at    time.Time
}

const maxSources = 4096

func newLimiter(rate float64, burst int, now func() time.Time) *limiter {
	return &limiter{rate: rate, burst: float64(burst), now: now, buckets: map[string]*bucket{}}
}

// allow takes one from the bucket of source.
func (l *limiter) allow(source string) bool {
	ok, _ := l.take(source)
	return ok
}

// maxPromise bounds how long somebody may be told to wait: who comes no more holds a place all the same.
const maxPromise = 2 * time.Minute

// queue is take for a bucket that many share: each who is turned away gets a time of his own to come back at, one after the other at the
// rate of the bucket. Were all told when the next one may come, all would come then, and again, until the answers alone take all of the CPU.
func (l *limiter) queue() (ok bool, after time.Duration) {
	ok, after = l.take("")
	if ok {
		return true, 0
	}
	return false, l.promise(after)
}

// promise is when the next one of those who are turned away may come back, not before the given time.
func (l *limiter) promise(after time.Duration) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	if next := now.Add(after); l.promised.Before(next) {
		l.promised = next
	} else if next = l.promised.Add(time.Duration(float64(time.Second) / l.rate)); next.Sub(now) <= maxPromise {
		l.promised = next
	}
	return l.promised.Sub(now)
}

// take is allow, and says after what time the source may try again.
func (l *limiter) take(source string) (ok bool, after time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	b := l.buckets[source]
	if b == nil {
		if len(l.buckets) >= maxSources {
			l.dropFull(now)
		}
		if len(l.buckets) >= maxSources {
			source = ""
		}
		if b = l.buckets[source]; b == nil {
			b = &bucket{level: l.burst, at: now}
			l.buckets[source] = b
		}
	}
	b.level = l.levelAt(b, now)
	b.at = now
	if b.level < 1 {
		return false, time.Duration((1 - b.level) / l.rate * float64(time.Second))
	}
	b.level--
	return true, 0
}

func (l *limiter) levelAt(b *bucket, now time.Time) float64 {
	return min(l.burst, b.level+max(now.Sub(b.at).Seconds(), 0)*l.rate)
}

// dropFull forgets the buckets that say nothing.
func (l *limiter) dropFull(now time.Time) {
	for k, b := range l.buckets {
		if l.levelAt(b, now) >= l.burst {
			delete(l.buckets, k)
		}
	}
}
