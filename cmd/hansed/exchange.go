package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/xdsgen"
	"github.com/hanse-mesh/hanse/discovery/xdsserver"
)

const (
	exchangeEvery = time.Second     // between what a replica tells the others of its proxies
	exchangeKept  = 5 * time.Second // after which a silent replica's proxies count no more
	exchangeTime  = 2 * time.Second // for one of the others to answer
	maxExchange   = 64 << 20        // bytes of one message
	maxReports    = 10000           // that wait; beyond it the oldest are lost
	movesTold     = time.Minute     // for how long it is told that an agent has come, and to a replica that has just started, who is here
)

// exchange is what replicas tell each other of the proxies that are connected to them: load reports, so that each knows the health of
// every endpoint and the leader sees a whole drill; how many call a service, so that all make the same levels; and who is connected, so that
// nobody waits for an agent that is somewhere else.
type exchange struct {
	p      *controlPlane
	client *http.Client

	mu      sync.Mutex
	reports []xdsserver.Report // guarded by mu; to be told
	heard   map[string]said    // guarded by mu; by replica's ID
}

// said is what a replica has told.
type said struct {
	at      time.Time
	callers xdsgen.Callers
	proxies []xdsserver.ProxyStatus
}

// message is one telling.
type message struct {
	Replica string                  `json:"replica"` // ID
	Reports []xdsserver.Report      `json:"reports"`
	Callers []calling               `json:"callers"`
	Proxies []xdsserver.ProxyStatus `json:"proxies"`
	Agents  []string                `json:"agents,omitempty"` // that follow their changes here, and may have been elsewhere
}

// calling is one count of Callers.
type calling struct {
	Service  discovery.Name     `json:"service"`
	Locality discovery.Locality `json:"locality"`
	Count    int                `json:"count"`
}

func newExchange(p *controlPlane) *exchange {
	return &exchange{p: p, client: &http.Client{Transport: p.replicaTransport(), Timeout: exchangeTime}, heard: map[string]said{}}
}

// tell puts a report of a proxy here on the way to the others.
func (x *exchange) tell(r xdsserver.Report) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.reports = append(x.reports, r); len(x.reports) > maxReports {
		x.reports = slices.Delete(x.reports, 0, len(x.reports)-maxReports)
	}
}

// Run tells the others until ctx ends.
func (x *exchange) Run(ctx context.Context) error {
	tick := time.NewTicker(exchangeEvery)
	defer tick.Stop()
	var counted xdsgen.Callers
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if callers := x.elsewhere(); !reflect.DeepEqual(callers, counted) {
			x.p.xds.SetCallersElsewhere(callers)
			counted = callers
		}
		m := message{Replica: x.p.replicas.self.ID, Proxies: x.p.xds.Proxies()}
		for service, by := range x.p.xds.Callers() {
			for at, n := range by {
				m.Callers = append(m.Callers, calling{service, at, n})
			}
		}
		x.mu.Lock()
		m.Reports, x.reports = x.reports, nil
		x.mu.Unlock()
		others := x.p.replicas.others()
		if len(others) == 0 {
			continue
		}
		if x.p.spire != nil {
			within := movesTold
			if slices.ContainsFunc(others, func(o replica) bool { return x.p.now().Sub(o.Started).Abs() < movesTold }) {
				within = math.MaxInt64
			}
			m.Agents = x.p.spire.Followers(within)
		}
		body, err := json.Marshal(m)
		if err != nil {
			return fmt.Errorf("encode what proxies report: %w", err)
		}
		var all sync.WaitGroup
		for _, o := range others {
			all.Go(func() {
				if err := x.post(ctx, o, body); err != nil && ctx.Err() == nil {
					x.p.log.Debug("a replica was not told of proxies here", "replica", o.Name, "err", err)
				}
			})
		}
		all.Wait()
	}
}

func (x *exchange) post(ctx context.Context, to replica, body []byte) error {
	if len(to.Addresses) == 0 {
		return errors.New("it advertises no federation address")
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+to.Addresses[0]+"/replica/v1/proxies", bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := x.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<20)); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusNoContent {
		return fmt.Errorf("it answered %s", resp.Status)
	}
	return nil
}

// ServeHTTP takes in what another replica tells.
func (x *exchange) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var m message
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxExchange)).Decode(&m); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	now := x.p.now()
	s := said{at: now, callers: xdsgen.Callers{}, proxies: m.Proxies}
	for _, c := range m.Callers {
		if s.callers[c.Service] == nil {
			s.callers[c.Service] = map[discovery.Locality]int{}
		}
		s.callers[c.Service][c.Locality] = max(0, c.Count)
	}
	x.mu.Lock()
	x.heard[m.Replica] = s
	x.mu.Unlock()
	if x.p.spire != nil {
		x.p.spire.Moved(m.Agents)
	}
	for _, report := range m.Reports {
		report.Time = now // by this clock
		x.p.note(report)
	}
	w.WriteHeader(http.StatusNoContent)
}

// fresh is what the others have told lately.
func (x *exchange) fresh() []said {
	x.mu.Lock()
	defer x.mu.Unlock()
	var out []said
	for _, s := range x.heard {
		if x.p.now().Sub(s.at) <= exchangeKept {
			out = append(out, s)
		}
	}
	return out
}

// moves names the proxies that are connected to other replicas, and, once, those that were connected to one that is gone.
func (x *exchange) moves() (elsewhere, stranded []string) {
	here := x.p.replicas.here()
	x.mu.Lock()
	defer x.mu.Unlock()
	for id, s := range x.heard {
		switch {
		case !here[id]:
			stranded = append(stranded, proxyIDs(s.proxies)...)
			delete(x.heard, id)
		case x.p.now().Sub(s.at) <= exchangeKept:
			elsewhere = append(elsewhere, proxyIDs(s.proxies)...)
		}
	}
	return elsewhere, stranded
}

// proxyIDs are those of the ones that acknowledge trust.
func proxyIDs(all []xdsserver.ProxyStatus) []string {
	var out []string
	for _, p := range all {
		if p.Hanse {
			out = append(out, p.Viewer.ID)
		}
	}
	return out
}

// elsewhere counts the callers at other replicas.
func (x *exchange) elsewhere() xdsgen.Callers {
	out := xdsgen.Callers{}
	for _, s := range x.fresh() {
		for service, by := range s.callers {
			if out[service] == nil {
				out[service] = map[discovery.Locality]int{}
			}
			for at, n := range by {
				out[service][at] += n
			}
		}
	}
	return out
}

// proxies lists those that are connected to any replica, by ID; of one that has just gone over to another replica, the newer connection.
func (p *controlPlane) proxies() []xdsserver.ProxyStatus {
	all := p.xds.Proxies()
	if p.exchange == nil {
		return all
	}
	for _, s := range p.exchange.fresh() {
		all = append(all, s.proxies...)
	}
	slices.SortFunc(all, func(a, b xdsserver.ProxyStatus) int {
		return cmp.Or(cmp.Compare(a.Viewer.ID, b.Viewer.ID), b.Connected.Compare(a.Connected))
	})
	return slices.CompactFunc(all, func(a, b xdsserver.ProxyStatus) bool { return a.Viewer.ID == b.Viewer.ID })
}
