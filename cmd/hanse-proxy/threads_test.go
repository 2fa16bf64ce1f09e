package main

import "testing"

func TestThreadsFollowTheLoad(t *testing.T) {
	th := &threads{limit: 8, n: 1}
	look := func(busy float64, times int) (n int) {
		for range times {
			n = th.next(busy)
		}
		return n
	}
	if n := look(0.5, 100); n != 1 {
		t.Errorf("half a CPU: %d threads", n)
	}
	var grown []int
	for range 5 {
		grown = append(grown, look(float64(th.n), 1))
	}
	if want := [5]int{2, 3, 5, 8, 8}; [5]int(grown) != want {
		t.Errorf("all that there is: %v, want %v", grown, want)
	}
	if n := look(3, 10*quietFor); n != 8 {
		t.Errorf("three CPUs keep 8 threads, not %d: no to and fro", n)
	}
	if n := look(0.1, quietFor-1); n != 8 {
		t.Errorf("a short pause: %d threads", n)
	}
	if n := look(0.1, 10*quietFor); n != 1 {
		t.Errorf("a long pause: %d threads", n)
	}
	one := &threads{limit: 1, n: 1}
	if n := one.next(1); n != 1 {
		t.Errorf("one CPU: %d threads", n)
	}
}
