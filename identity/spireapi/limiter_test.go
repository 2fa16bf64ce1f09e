package spireapi

import (
	"container/heap"
	"testing"
	"time"
)

type times []time.Duration

func (t times) Len() int           { return len(t) }
func (t times) Less(i, j int) bool { return t[i] < t[j] }
func (t times) Swap(i, j int)      { t[i], t[j] = t[j], t[i] }
func (t *times) Push(x any)        { *t = append(*t, x.(time.Duration)) }
func (t *times) Pop() any {
	x := (*t)[len(*t)-1]
	*t = (*t)[:len(*t)-1]
	return x
}

// TestMassStart lets 10,000 come at the same moment and each come back when it was told, up to a tenth later as our agents do. All are let in
// about as soon as the rate allows, and ask hardly more than twice.
func TestMassStart(t *testing.T) {
	start := time.Unix(1e9, 0)
	now := start
	const rate, burst, n = 200, 1000, 10000
	l := newLimiter(rate, burst, func() time.Time { return now })
	waiting := make(times, n)
	tries := 0
	var last time.Duration
	for len(waiting) > 0 {
		at := heap.Pop(&waiting).(time.Duration)
		now = start.Add(at)
		tries++
		ok, after := l.queue()
		if !ok {
			heap.Push(&waiting, at+after+time.Duration(float64(after)*0.1*float64(tries%10)/10))
			continue
		}
		last = at
	}
	t.Logf("all in after %v, %d tries", last, tries)
	if least := time.Duration(n-burst) * time.Second / rate; last < least || last > least*6/5 {
		t.Errorf("the last was let in after %v, the rate allows %v", last, least)
	}
	if tries > n*5/2 {
		t.Errorf("%d tries of %d", tries, n)
	}
}
