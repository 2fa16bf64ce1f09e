package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/discovery/kube"
	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/identity/onspire"
)

// newKube is the source of an API server's objects, which are changed in terms only. It need not be there yet.
func newKube(cfg KubeAPI, term func() (onspire.Term, bool), log *slog.Logger, reg prometheus.Registerer) (*kube.Source, error) {
	config, err := kubeREST(cfg, term)
	if err != nil {
		return nil, err
	}
	return kube.New(kube.Config{REST: config, Log: log, Registerer: reg})
}

// kubeREST is how the API server is reached.
func kubeREST(cfg KubeAPI, term func() (onspire.Term, bool)) (config *rest.Config, err error) {
	if cfg.Kubeconfig == "" {
		if config, err = rest.InClusterConfig(); err != nil {
			return nil, fmt.Errorf("kubeAPI: %w (outside a pod: give kubeAPI.kubeconfig)", err)
		}
	} else if config, err = clientcmd.NewNonInteractiveDeferredLoadingClientConfig(&clientcmd.ClientConfigLoadingRules{ExplicitPath: cfg.Kubeconfig},
		&clientcmd.ConfigOverrides{CurrentContext: cfg.Context}).ClientConfig(); err != nil {
		return nil, fmt.Errorf("kubeAPI.kubeconfig %s: %w", cfg.Kubeconfig, err)
	}
	config.Wrap(func(next http.RoundTripper) http.RoundTripper { return fenced{next, term} })
	return config, nil
}

// kubeView is the view that the API server is told of: none before all that was known has been loaded, or nothing would seem imported.
func (p *controlPlane) kubeView() (*discovery.Clusterset, <-chan struct{}) {
	updated := p.mesh.Updated()
	select {
	case <-p.mesh.Loaded():
		return p.mesh.Clusterset(), updated
	default:
		return nil, p.mesh.Loaded()
	}
}

// fenced lets a change of the API server's objects out only in a term of this replica's, and ends it with that term: the API server knows no
// fences, so a leader that was paused must find out for itself that another one leads now. That it is the term in which the change was decided is for the
// request's context to say.
type fenced struct {
	http.RoundTripper
	term func() (onspire.Term, bool)
}

// RoundTrip implements http.RoundTripper.
func (f fenced) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Method == http.MethodGet || req.Method == http.MethodHead {
		return f.RoundTripper.RoundTrip(req)
	}
	refuse := func(err error) (*http.Response, error) {
		if req.Body != nil {
			req.Body.Close()
		}
		return nil, err
	}
	if err := req.Context().Err(); err != nil {
		return refuse(err)
	}
	term, leads := f.term()
	if !leads {
		return refuse(etcd.ErrNotLeader)
	}
	ctx, end, err := term(req.Context())
	if err != nil {
		return refuse(err)
	}
	resp, err := f.RoundTripper.RoundTrip(req.WithContext(ctx))
	if err != nil {
		end()
		return nil, err
	}
	resp.Body = fencedBody{resp.Body, end}
	return resp, nil
}

// WrappedRoundTripper is for client-go, which looks for what it can close.
func (f fenced) WrappedRoundTripper() http.RoundTripper { return f.RoundTripper }

// fencedBody ends its request's context when it is closed.
type fencedBody struct {
	io.ReadCloser
	end context.CancelFunc
}

// Close implements io.Closer.
func (b fencedBody) Close() error {
	defer b.end()
	return b.ReadCloser.Close()
}
