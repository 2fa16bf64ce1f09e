package agent

import (
	"context"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// followWorkloadAPI copies what another agent serves into the Source, until ctx ends. The client reconnects by itself.
func (a *Agent) followWorkloadAPI(ctx context.Context) error {
	c, err := workloadapi.New(ctx, workloadapi.WithAddr(a.cfg.WorkloadAPI))
	if err != nil {
		return fmt.Errorf("identity agent: Workload API %s: %w", a.cfg.WorkloadAPI, err)
	}
	defer func() {
		if err := c.Close(); err != nil {
			a.log.Debug("close Workload API client", "error", err)
		}
	}()
	err = c.WatchX509Context(ctx, x509Watcher{a})
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("identity agent: Workload API %s: %w", a.cfg.WorkloadAPI, err)
}

// x509Watcher implements workloadapi.X509ContextWatcher.
type x509Watcher struct{ *Agent }

func (w x509Watcher) OnX509ContextUpdate(c *workloadapi.X509Context) {
	svid := c.DefaultSVID()
	bundles := map[spiffeid.TrustDomain]*spiffebundle.Bundle{}
	for _, b := range c.Bundles.Bundles() {
		bundles[b.TrustDomain()] = spiffebundle.FromX509Bundle(b)
	}
	w.src.Set(svid, bundles)
	w.metrics.renewals.WithLabelValues("x509").Inc()
	w.log.Info("X509-SVID received", "id", svid.ID.String(), "expires", svid.Certificates[0].NotAfter)
}

func (w x509Watcher) OnX509ContextWatchError(err error) {
	w.metrics.failures.WithLabelValues("workload_api").Inc()
	w.log.Warn("cannot follow the Workload API; the last identity stays in force", "address", w.cfg.WorkloadAPI, "error", err)
}
