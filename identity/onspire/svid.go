package onspire

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/hanse-mesh/hanse/identity"
)

// RunSVID keeps the control plane's SVID in src as the agent renews it, until ctx ends. Bundles of src are somebody else's.
func (s *Server) RunSVID(ctx context.Context, src *identity.Source) error {
	c, err := workloadapi.New(ctx, workloadapi.WithAddr(s.cfg.WorkloadAPI), workloadapi.WithBackoffStrategy(steady{}))
	if err != nil {
		return fmt.Errorf("the Workload API %s: %w", s.cfg.WorkloadAPI, err)
	}
	defer c.Close()
	if err := c.WatchX509Context(ctx, watcher{s, src}); ctx.Err() == nil {
		return fmt.Errorf("the Workload API %s: %w", s.cfg.WorkloadAPI, err)
	}
	return nil
}

// credentials takes what the agent gives for calls to spire-server, and returns the control plane's own SVID, if it is among it.
func (s *Server) credentials(x *workloadapi.X509Context) (*x509svid.SVID, bool) {
	i := slices.IndexFunc(x.SVIDs, func(v *x509svid.SVID) bool { return v.ID == identity.ControlPlaneID(s.cfg.TrustDomain) })
	if i < 0 {
		return nil, false
	}
	bundles := map[spiffeid.TrustDomain]*spiffebundle.Bundle{}
	if b, ok := x.Bundles.Get(s.cfg.TrustDomain); ok {
		bundles[s.cfg.TrustDomain] = spiffebundle.FromX509Bundle(b)
	}
	s.creds.Set(x.SVIDs[i], bundles)
	return x.SVIDs[i], true
}

// watcher implements workloadapi.X509ContextWatcher.
type watcher struct {
	*Server
	src *identity.Source
}

func (w watcher) OnX509ContextUpdate(x *workloadapi.X509Context) {
	svid, ok := w.credentials(x)
	if !ok {
		w.OnX509ContextWatchError(fmt.Errorf("none of the %d SVIDs that the agent gives is %s", len(x.SVIDs), identity.ControlPlaneID(w.cfg.TrustDomain)))
		return
	}
	w.src.SetSVID(svid)
	w.mu.Lock()
	w.status.AgentErr = nil
	w.mu.Unlock()
	w.log.Info("own X509-SVID received", "id", svid.ID.String(), "expires", svid.Certificates[0].NotAfter)
}

func (w watcher) OnX509ContextWatchError(err error) {
	w.failures.WithLabelValues("workload_api").Inc()
	w.mu.Lock()
	news := w.status.AgentErr == nil || w.status.AgentErr.Error() != err.Error()
	w.status.AgentErr = err
	w.mu.Unlock()
	if news {
		w.log.Warn("cannot follow the Workload API; the last SVID stays in force", "address", w.cfg.WorkloadAPI, "err", err)
	}
}

// steady asks again every second: the agent is on this machine, and an entry may just have been made.
type steady struct{}

func (steady) NewBackoff() workloadapi.Backoff { return steady{} }

func (steady) Next() time.Duration { return time.Second }

func (steady) Reset() {}
