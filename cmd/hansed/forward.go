package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"strings"
	"time"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
	"github.com/hanse-mesh/hanse/federation/join"
	"github.com/hanse-mesh/hanse/identity"
)

// forwarded marks what a replica passes on, so that it is passed on once only.
const forwarded = "Hanse-Forwarded-By"

// leaders are the operations of the leader: all that change something of the whole cluster, and what only it can say.
func leaders(r *http.Request) (only, better bool) {
	path := r.URL.Path
	switch {
	case path == "/v1/tokens", path == "/v1/admins", path == "/v1/explain", path == "/v1/drills/plan", path == "/v1/trust-rotate": // any replica's
		return false, false
	case path == "/v1/join" || strings.HasPrefix(path, "/v1/drills"):
		return true, true
	case r.Method != http.MethodGet:
		return true, true
	}
	return false, path == "/v1/status" || path == "/v1/clusters"
}

// everyones are the operations that each replica does with its own trust store. A distrust is in etcd, too: it is told so that it is obeyed
// while etcd is away.
func everyones(r *http.Request) bool {
	return r.Method == http.MethodPost && (r.URL.Path == "/v1/trust-distrust" ||
		strings.HasPrefix(r.URL.Path, "/v1/trust/") && strings.HasSuffix(r.URL.Path, "/refresh"))
}

const (
	maxEveryones  = 4 << 20          // bytes of such a request
	everyonesTime = 10 * time.Minute // for a replica to do it
)

// tellAll passes a request on to all other replicas, and lets local answer it. Who asked hears of this replica; that another one could not be
// told is in the log.
func (p *controlPlane) tellAll(w http.ResponseWriter, r *http.Request, local http.Handler) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxEveryones))
	if err != nil {
		admin.Fail(w, r, admin.Invalid("", "read the request: %v", err), p.log)
		return
	}
	for _, o := range p.replicas.others() {
		go func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), everyonesTime)
			defer cancel()
			if err := p.tellReplica(ctx, o, r, body); err != nil {
				p.log.Error("a replica was not told: do the same there", "replica", o.Name, "operation", r.URL.Path, "err", err)
			}
		}()
	}
	again := r.Clone(r.Context())
	again.Body = io.NopCloser(bytes.NewReader(body))
	local.ServeHTTP(w, again)
}

func (p *controlPlane) tellReplica(ctx context.Context, to replica, r *http.Request, body []byte) error {
	if len(to.Addresses) == 0 {
		return errors.New("it advertises no federation address")
	}
	req, err := http.NewRequestWithContext(ctx, r.Method, "https://"+to.Addresses[0]+r.URL.RequestURI(), bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header = r.Header.Clone()
	req.Header.Set(forwarded, p.replicas.self.Name)
	resp, err := (&http.Client{Transport: p.exchange.client.Transport}).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 4<<20))
	if resp.StatusCode == http.StatusNotFound && r.URL.Path == "/v1/trust-distrust" {
		return nil // etcd was faster
	}
	if err == nil && resp.StatusCode >= 400 {
		err = fmt.Errorf("it answered %s: %.500s", resp.Status, answer)
	}
	return err
}

// betterTime is how long the leader is waited for where this replica can answer as well, if not as fully.
const betterTime = 3 * time.Second

// electionTime is how long a request that only the leader can answer waits for there to be one: the lease of one that has died, and an election.
const electionTime = 10 * time.Second

// whileLeads is a context that ends when another replica leads: the one that was asked has died, or is paused.
func (p *controlPlane) whileLeads(ctx context.Context, id string) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		tick := time.NewTicker(250 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			if leader, ok := p.replicas.leader(); !ok || leader.ID != id {
				cancel()
				return
			}
		}
	}()
	return ctx, cancel
}

// passedTo is the key, in a request's context, of the replica that it is passed on to: by then another one, or nobody, may lead.
type passedTo struct{}

func leaderOf(r *http.Request) replica {
	leader, _ := r.Context().Value(passedTo{}).(replica)
	return leader
}

// viaLeader serves the admin API of a replica: what is the leader's is passed on to it.
func (p *controlPlane) viaLeader(local http.Handler) http.Handler {
	pass := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			leader := leaderOf(r.In)
			r.Out.URL.Scheme, r.Out.URL.Host = "https", leader.Addresses[0]
			r.Out.Header.Set(forwarded, p.replicas.self.Name)
		},
		Transport:     p.exchange.client.Transport,
		FlushInterval: -1,
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			if only, _ := leaders(r); !only {
				local.ServeHTTP(w, r.WithContext(context.WithoutCancel(r.Context())))
				return
			}
			leader := leaderOf(r)
			admin.Fail(w, r, &admin.Error{Status: http.StatusServiceUnavailable,
				Message: fmt.Sprintf("replica %s at %s leads this cluster's control plane, and does not answer: %v", leader.Name, strings.Join(leader.Addresses, ", "), err),
				Hint:    "try again in some seconds, when another may lead; hanse status shows who does"}, p.log)
		},
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if everyones(r) {
			if r.Header.Get(forwarded) == "" {
				p.tellAll(w, r, local)
			} else {
				local.ServeHTTP(w, r)
			}
			return
		}
		only, better := leaders(r)
		if !better {
			local.ServeHTTP(w, r)
			return
		}
		var wait time.Duration
		if only {
			wait = electionTime
		}
		leader, ok := p.awaitLeader(r.Context(), r.Header.Get(forwarded) == "", wait)
		switch {
		case ok && leader.ID != p.replicas.self.ID:
			ctx, cancel := p.whileLeads(r.Context(), leader.ID)
			defer cancel()
			if !only { // it can be answered here, too
				var stop context.CancelFunc
				ctx, stop = context.WithTimeout(ctx, betterTime)
				defer stop()
			}
			pass.ServeHTTP(w, r.WithContext(context.WithValue(ctx, passedTo{}, leader)))
		case !ok && only:
			admin.Fail(w, r, p.replicas.refuse(), p.log)
		default:
			local.ServeHTTP(w, r)
		}
	})
}

// awaitLeader is who does what is the leader's: this replica once it leads or, where others may be asked, one that is there. ok is false if
// there was nobody after the wait: a leader that has just been elected first reads what the one before it wrote.
func (p *controlPlane) awaitLeader(ctx context.Context, others bool, wait time.Duration) (leader replica, ok bool) {
	end := time.Now().Add(wait)
	for {
		if p.replicas.leads() {
			return p.replicas.self, true
		}
		leader, ok := p.replicas.leader()
		if ok && others && leader.ID != p.replicas.self.ID && len(leader.Addresses) > 0 {
			return leader, true
		}
		if ctx.Err() != nil || !time.Now().Before(end) {
			return replica{}, false
		}
		pause(ctx, 50*time.Millisecond)
	}
}

// replicaTransport makes connections to other replicas' federation listeners, by SVID. It does not go through the switchboard: a drill that
// cuts this cluster's links to its peers leaves it whole.
func (p *controlPlane) replicaTransport() *http.Transport {
	return &http.Transport{
		DialTLSContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
			defer cancel()
			raw, err := (&net.Dialer{}).DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			cfg := identity.ClientTLS(p.source, identity.AuthorizeID(identity.ControlPlaneID(p.td)), "http/1.1")
			cfg.ServerName = join.ReplicaName
			conn := tls.Client(raw, cfg)
			if err := conn.HandshakeContext(ctx); err != nil {
				return nil, errors.Join(err, raw.Close())
			}
			return conn, nil
		},
		DisableCompression: true, MaxIdleConnsPerHost: 4, IdleConnTimeout: 30 * time.Second, ResponseHeaderTimeout: 2 * time.Minute,
	}
}
