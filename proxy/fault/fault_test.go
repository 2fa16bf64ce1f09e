package fault_test

import (
	"context"
	"log/slog"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/fault"
)

// bubble runs f with an Injector on the fake clock.
func bubble(t *testing.T, f func(t *testing.T, i *fault.Injector)) {
	synctest.Test(t, func(t *testing.T) {
		i := fault.New(slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- i.Run(ctx) }()
		f(t, i)
		cancel()
		<-done
		if active, _ := i.Active(); len(active) != 0 {
			t.Errorf("in force after Run: %v", active)
		}
	})
}

func inForce(i *fault.Injector) bool {
	active, _ := i.Active()
	return len(active) > 0
}

func TestHealsByItself(t *testing.T) {
	f := proxy.Fault{Drill: "d", Mode: proxy.FaultErrors, Share: 100, Status: 503, End: time.Minute, Lease: 15 * time.Second}
	bubble(t, func(t *testing.T, i *fault.Injector) {
		i.Set([]proxy.Fault{f})
		time.Sleep(14 * time.Second)
		i.Set([]proxy.Fault{f}) // the same receipt again, for another change of the Table
		if time.Sleep(2 * time.Second); inForce(i) {
			t.Error("lease was renewed by an unrelated Table")
		}
		f.Renewal++
		for range 20 {
			i.Set([]proxy.Fault{f})
			f.Renewal++
			time.Sleep(5 * time.Second)
		}
		if inForce(i) {
			t.Error("renewals carried the fault beyond its end")
		}
		i.Set(nil)
		i.Set([]proxy.Fault{f})
		if !inForce(i) {
			t.Error("a new order after the old one was withdrawn is not obeyed")
		}
		i.Set(nil)
		if inForce(i) {
			t.Error("in force though no Table names it")
		}
	})
}

func TestRequest(t *testing.T) {
	bubble(t, func(t *testing.T, i *fault.Injector) {
		i.Set([]proxy.Fault{
			{Drill: "a", Mode: proxy.FaultErrors, Share: 50, Status: 500},
			{Drill: "b", Mode: proxy.FaultSlow, Share: 100, Latency: time.Second, Ports: []uint16{1}},
			{Drill: "c", Mode: proxy.FaultBlackhole, Share: 100, Ports: []uint16{2}},
			{Drill: "d", Mode: proxy.FaultDrain, Share: 100, Ports: []uint16{3}},
		})
		failed := 0
		for range 2000 {
			if i.Request(9).Status == 500 {
				failed++
			}
		}
		if failed < 850 || failed > 1150 {
			t.Errorf("%d of 2000 failed, want about half", failed)
		}
		if v := i.Request(1); v.Delay != time.Second || v.Hold || v.Refuse {
			t.Errorf("port 1: %+v", v)
		}
		if v := i.Request(2); !v.Hold {
			t.Errorf("port 2: %+v", v)
		}
		if v := i.Request(3); !v.Refuse {
			t.Errorf("port 3: %+v", v)
		}
	})
}

func TestSilence(t *testing.T) {
	bubble(t, func(t *testing.T, i *fault.Injector) {
		a, b := net.Pipe()
		c := i.Wrap(b)
		i.Set([]proxy.Fault{{Drill: "d", Mode: proxy.FaultBlackhole, Share: 100, End: 10 * time.Second}})
		start := time.Now()
		go func() { _, _ = a.Write([]byte("x")) }()
		if n, err := c.Read(make([]byte, 1)); n != 1 || err != nil || time.Since(start) != 10*time.Second {
			t.Errorf("read %d, %v after %s; want the byte when the fault heals", n, err, time.Since(start))
		}
		i.Set([]proxy.Fault{{Drill: "e", Mode: proxy.FaultBlackhole, Share: 100}})
		go func() { time.Sleep(time.Second); _ = c.Close() }()
		if _, err := c.Write([]byte("x")); err == nil {
			t.Error("write on a closed connection succeeded")
		}
		_ = a.Close()
	})
}
