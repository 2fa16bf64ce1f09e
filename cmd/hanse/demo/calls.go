package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sync"
	"time"
)

// Call is one call of a workload, as its application saw it.
type Call struct {
	From    string  `json:"from"` // west/frontend
	To      string  `json:"to"`   // payments.shop:8080
	Status  int     `json:"status"`
	Cluster string  `json:"cluster,omitempty"` // who served it
	Zone    string  `json:"zone,omitempty"`
	Served  string  `json:"served,omitempty"` // the instance
	Caller  string  `json:"caller,omitempty"` // the SPIFFE ID that the server saw
	Via     string  `json:"via,omitempty"`    // the address that the server's sidecar was connected from
	Error   string  `json:"error,omitempty"`
	Millis  float64 `json:"ms"`
}

// caller calls services as the application of a workload: by its sidecar's HTTP proxy.
type caller struct {
	from string
	http *http.Client
}

func newCaller(w *workload) *caller {
	proxy := &url.URL{Scheme: "http", Host: w.Outbound}
	return &caller{from: w.Cluster.Name + "/" + w.Name, http: &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		Proxy: http.ProxyURL(proxy), MaxIdleConnsPerHost: 16, IdleConnTimeout: 30 * time.Second}}}
}

// get calls a service. A call that was refused or failed has a Status of 0 or 400 and above.
func (c *caller) get(ctx context.Context, to string) (call Call) {
	call = Call{From: c.from, To: to}
	start := time.Now()
	defer func() { call.Millis = float64(time.Since(start).Microseconds()) / 1000 }()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+to+"/", nil)
	if err != nil {
		call.Error = err.Error()
		return call
	}
	res, err := c.http.Do(req)
	if err != nil {
		call.Error = err.Error()
		return call
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err != nil {
		call.Error = err.Error()
		return call
	}
	call.Status = res.StatusCode
	var answer struct{ Cluster, Zone, Instance, Caller, PeerAddress string }
	if res.StatusCode != http.StatusOK {
		call.Error = firstLine(b)
	} else if err := json.Unmarshal(b, &answer); err != nil {
		call.Status, call.Error = 0, fmt.Sprintf("not an answer of echo: %v", err)
	}
	call.Cluster, call.Zone, call.Served, call.Caller, call.Via = answer.Cluster, answer.Zone, answer.Instance, answer.Caller, answer.PeerAddress
	return call
}

func firstLine(b []byte) string {
	for i, c := range b {
		if c == '\n' || i == 300 {
			return string(b[:i])
		}
	}
	return string(b)
}

// traffic calls a service steadily, as an application under load does, and counts who served it.
type traffic struct {
	caller *caller
	to     string

	mu      sync.Mutex // guards all below
	counts  map[string]int
	calls   int
	failed  int
	slowest float64  // milliseconds, since it was last asked for
	recent  []string // who served the newest, at most recentCalls
	fault   string   // of the newest that failed
}

const (
	trafficWorkers  = 8
	trafficInterval = 40 * time.Millisecond // of each worker: 200 calls a second together
	recentCalls     = 100
)

func newTraffic(w *workload, to string) *traffic {
	return &traffic{caller: newCaller(w), to: to, counts: map[string]int{}}
}

// run calls until ctx ends.
func (t *traffic) run(ctx context.Context) {
	var all sync.WaitGroup
	for range trafficWorkers {
		all.Go(func() {
			tick := time.NewTicker(trafficInterval)
			defer tick.Stop()
			for {
				c := t.caller.get(ctx, t.to)
				if ctx.Err() != nil {
					return
				}
				t.count(c)
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
			}
		})
	}
	all.Wait()
	t.caller.http.CloseIdleConnections()
}

func (t *traffic) count(c Call) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.calls++
	t.slowest = max(t.slowest, c.Millis)
	if c.Status != http.StatusOK {
		t.failed++
		t.fault = fmt.Sprintf("%d %s", c.Status, c.Error)
		return
	}
	t.counts[c.Cluster+"/"+c.Zone]++
	if t.recent = append(t.recent, c.Cluster+"/"+c.Zone); len(t.recent) > recentCalls {
		t.recent = t.recent[1:]
	}
}

// settled waits until nine in ten calls are served in one place.
func (t *traffic) settled(ctx context.Context, place string) error {
	return until(ctx, time.Minute, "calls are served in "+place, func(context.Context) error {
		t.mu.Lock()
		defer t.mu.Unlock()
		n := 0
		for _, p := range t.recent {
			if p == place {
				n++
			}
		}
		if n < recentCalls*9/10 {
			return fmt.Errorf("%d of the last %d calls", n, len(t.recent))
		}
		return nil
	})
}

// served is a copy of the counts.
func (t *traffic) served() (byPlace map[string]int, calls, failed int, fault string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	byPlace = map[string]int{}
	for k, v := range t.counts {
		byPlace[k] = v
	}
	return byPlace, t.calls, t.failed, t.fault
}

// worst is how long the slowest call took since worst was last called, in milliseconds.
func (t *traffic) worst() float64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	w := t.slowest
	t.slowest = 0
	return w
}

// until polls until ok is true. The error says what was waited for, and what ok said last.
func until(ctx context.Context, limit time.Duration, what string, ok func(context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, errors.New("it took too long"))
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ok(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w; last: %w", what, context.Cause(ctx), err)
		case <-tick.C:
		}
	}
}

// ready asks a process whether it is ready.
func ready(ctx context.Context, admin string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+admin+"/readyz", nil)
	if err != nil {
		return err
	}
	c := http.Client{Timeout: 2 * time.Second}
	res, err := c.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, 4096))
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("not ready: %s", firstLine(b))
	}
	return nil
}
