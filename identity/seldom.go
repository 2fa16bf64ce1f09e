package identity

import (
	"sync/atomic"
	"time"
)

// Seldom lets a line into the log every 10 s: what a flood sets off must not be one itself. The counters have it all. The zero value is ready.
type Seldom struct{ next atomic.Int64 } // Unix nanoseconds

// Due reports whether the line may be written now.
func (s *Seldom) Due(now time.Time) bool {
	next := s.next.Load()
	return now.UnixNano() >= next && s.next.CompareAndSwap(next, now.Add(10*time.Second).UnixNano())
}
