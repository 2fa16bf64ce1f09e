package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
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
	case path == "/v1/tokens", path == "/v1/admins", path == "/v1/explain", path == "/v1/drills/plan": // any replica's
		return false, false
	case path == "/v1/join" || strings.HasPrefix(path, "/v1/drills"):
		return true, true
	case r.Method != http.MethodGet:
		return true, true
	}
	return false, path == "/v1/status" || path == "/v1/clusters"
}

// betterTime is how long the leader is waited for where this replica can answer as well, if not as fully.
const betterTime = 3 * time.Second

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

// viaLeader serves the admin API of a replica: what is the leader's is passed on to it.
func (p *controlPlane) viaLeader(local http.Handler) http.Handler {
	pass := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			leader, _ := p.replicas.leader()
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
			leader, _ := p.replicas.leader()
			admin.Fail(w, r, &admin.Error{Status: http.StatusServiceUnavailable,
				Message: fmt.Sprintf("replica %s at %s leads this cluster's control plane, and does not answer: %v", leader.Name, strings.Join(leader.Addresses, ", "), err),
				Hint:    "try again in some seconds, when another may lead; hanse status shows who does"}, p.log)
		},
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		only, better := leaders(r)
		if p.replicas.leads() || !better {
			local.ServeHTTP(w, r)
			return
		}
		leader, ok := p.replicas.leader()
		self := leader.ID == p.replicas.self.ID // elected, and about to lead
		switch {
		case ok && !self && len(leader.Addresses) > 0 && r.Header.Get(forwarded) == "":
			ctx, cancel := p.whileLeads(r.Context(), leader.ID)
			defer cancel()
			if !only { // it can be answered here, too
				var stop context.CancelFunc
				ctx, stop = context.WithTimeout(ctx, betterTime)
				defer stop()
			}
			pass.ServeHTTP(w, r.WithContext(ctx))
		case only:
			admin.Fail(w, r, p.replicas.refuse(), p.log)
		default:
			local.ServeHTTP(w, r)
		}
	})
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
