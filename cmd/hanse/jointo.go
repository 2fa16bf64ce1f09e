package main

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
)

const reachAgain = time.Second // between looks for addresses

// joinTo joins the cluster of the chosen context through a member in another.
func (c *cli) joinTo(ctx context.Context, to string, check bool, patience time.Duration) error {
	x, err := c.chosen()
	if err != nil {
		return err
	}
	if x.Name != "" && x.Name == to {
		return usage("hanse join --context EAST --to-context WEST", "%q cannot join itself", to)
	}
	joiner, err := c.clientOf(x)
	if err != nil {
		return err
	}
	defer joiner.Close()
	at, err := c.named(to)
	if err != nil {
		return err
	}
	member, err := c.clientOf(at)
	if err != nil {
		return err
	}
	defer member.Close()

	own, err := c.reachable(ctx, joiner, cmp.Or(x.Name, "this cluster"), patience)
	if err != nil {
		return err
	}
	theirs, err := c.reachable(ctx, member, to, patience)
	if err != nil {
		return err
	}
	if own.Name == theirs.Name && own.TrustDomain == theirs.TrustDomain {
		return usage("hanse contexts", "both contexts are cluster %q", own.Name)
	}
	if own.Network != theirs.Network {
		for _, m := range []admin.Cluster{own, theirs} {
			if len(m.Gateways) == 0 {
				c.check(c.err, palette{on: c.errTTY && c.colours()}, admin.Check{Name: "gateways of " + m.Name, Warn: true, Detail: "no address yet: until then its services cannot be called from elsewhere",
					Remedy: "has the Service hanse-gateway an address? If there is no load balancer: hanse upgrade --set gateway.service.type=NodePort, or give addresses (gateway.addresses)"}, checkWidth)
			}
		}
	}
	token, err := member.CreateToken(ctx, admin.TokenRequest{For: own.Name})
	if err != nil {
		return err
	}
	if !c.structured() {
		fmt.Fprintf(c.out, "%s made a token for %q\n", theirs.Name, own.Name)
	}
	return c.join(ctx, joiner, admin.JoinRequest{Token: token.Token, Check: check})
}

// reachable waits until a cluster knows where others reach it, and returns what it says of itself. Without gateways it is joined all the same, but they are waited for.
func (c *cli) reachable(ctx context.Context, b admin.Backend, name string, patience time.Duration) (admin.Cluster, error) {
	begin, said := c.now(), false
	for {
		all, err := b.Clusters(ctx)
		if err != nil {
			return admin.Cluster{}, err
		}
		if len(all.Clusters) == 0 {
			return admin.Cluster{}, fmt.Errorf("%s does not say which cluster it is", name)
		}
		self := all.Clusters[0]
		var lacking []string
		if len(self.Addresses) == 0 {
			lacking = append(lacking, "its federation port")
		}
		if len(self.Gateways) == 0 {
			lacking = append(lacking, "its gateways")
		}
		late := c.now().Sub(begin) > patience
		switch {
		case len(lacking) == 0, late && len(self.Addresses) > 0:
			return self, nil
		case late:
			return admin.Cluster{}, &admin.Error{Message: fmt.Sprintf("%s does not know by which address others reach its federation port", self.Name),
				Hint: "has the Service hanse-federation an address? If there is no load balancer: hanse upgrade --set federation.service.type=NodePort, or --set 'federation.advertise={HOST:PORT}'"}
		case !said:
			fmt.Fprintf(c.err, "waiting until %s knows by which address others reach %s\n", self.Name, strings.Join(lacking, " and "))
			said = true
		}
		select {
		case <-ctx.Done():
			return admin.Cluster{}, ctx.Err()
		case <-time.After(reachAgain):
		}
	}
}
