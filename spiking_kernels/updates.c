/* One step of Grad Rewiring or of Deep R on a tensor of weights. */

#include "random.h"

#define AHEAD 512 /* numbers from those that are read to those that are asked for meanwhile */

/* A parameter: its tensors, of n elements, and how many steps it has taken. updates.py has this and Settings, too. */
typedef struct {
    float *w;
    const float *grad;
    float *m, *v, *max_v; /* max_v is null without amsgrad */
    const int8_t *sign;
    float *theta; /* null in Deep R that is not soft */
    float *steps;
    int64_t n;
    int64_t moderate; /* a step sets it to whether all numbers of grad and w are, see `most` */
} Parameter;

/* The settings of its group, those of Adam first; direction is -1 to maximize. */
typedef struct {
    double lr, beta1, beta2, eps, weight_decay, direction, alpha, mu, l1, T, max_s, theta_min;
} Settings;

/* What a step needs beside its tensors: correction is sqrt(1 - beta2^t), scale its inverse, eta the step size. */
typedef struct {
    float beta1, one_minus_beta1, beta2, one_minus_beta2, correction, scale, eps, eta, weight_decay, direction;
    float prior, mu;                   /* of Grad R: alpha * eta */
    float penalty, temperature, bound; /* of Deep R: l1 * eta, T * sqrt(eta), the least theta */
} Step;

/* The largest of n numbers that are moderate: in any order, the sum of such numbers is finite in float32. */
static float most(int64_t n) { return FLT_MAX / 2 / (float)n; }

/* Begins the next step of a parameter; in double, as 1 - beta^t is small at first. */
static Step begin(const Parameter *of, const Settings *s) {
    const double t = *of->steps + 1.0, eta = s->lr / (1.0 - pow(s->beta1, t));
    const float correction = sqrt(1.0 - pow(s->beta2, t));
    *of->steps = (float)t;
    return (Step){
        .beta1 = s->beta1,
        .one_minus_beta1 = 1.0 - s->beta1,
        .beta2 = s->beta2,
        .one_minus_beta2 = 1.0 - s->beta2,
        .correction = correction,
        .scale = 1.0f / correction,
        .eps = s->eps,
        .eta = eta,
        .weight_decay = s->weight_decay,
        .direction = s->direction,
        .prior = s->alpha * eta,
        .mu = s->mu,
        .penalty = s->l1 * eta,
        .temperature = s->T * sqrt(eta),
        .bound = s->theta_min,
    };
}

/* One weight: see gradrewire.GradRewiring, whose symbols these are. x is v, or its running maximum. */
static inline void grad_rewiring_one(float *w, float g, float *m, float *v, float *x, float s, float *theta, Step p) {
    g = p.direction * g + (p.weight_decay != 0.0f ? p.weight_decay * *w : 0.0f);
    *m = *m * p.beta1 + g * p.one_minus_beta1;
    *v = *v * p.beta2 + g * g * p.one_minus_beta2;
    *x = *x > *v ? *x : *v;
    float above = *theta - p.mu;
    float push = above > 0.0f ? p.prior : above < 0.0f ? -p.prior : 0.0f;
    float t = (*theta * s - *m * p.eta / (sqrtf(*x) * p.scale + p.eps) - push * s) * s;
    *theta = t;
    *w = (t < 0.0f ? 0.0f : t) * s; /* NaN stays NaN */
}

#ifdef WIDTH
/* The same for sixteen weights, without weight decay and running maximum. w is written, not read: past the cache
 * (streamed), that costs half the memory traffic. Returns whether a gradient or a weight is not moderate. */
static INLINE int grad_rewiring_sixteen(float *w, const float *g, float *m, float *v, const int8_t *sign, float *theta,
                                        Step p, float most, int streamed) {
    const Vector zero = v_all(0.0f), prior = v_all(p.prior), bound = v_all(most);
    unsigned found = 0;
    if (WIDTH == 16) { /* not every processor foresees the next page; with AVX2 it costs more: see docs/kernels.md */
        __builtin_prefetch(g + AHEAD);
        __builtin_prefetch(m + AHEAD, 1);
        __builtin_prefetch(v + AHEAD, 1);
        __builtin_prefetch(theta + AHEAD, 1);
        if (!streamed) __builtin_prefetch(w + AHEAD, 1);
    }
    for (int i = 0; i < 16; i += WIDTH) {
        const Vector G = v_mul(v_load(g + i), v_all(p.direction)), S = v_signs(sign + i);
        const Vector M = v_fma(v_load(m + i), v_all(p.beta1), v_mul(G, v_all(p.one_minus_beta1)));
        const Vector V = v_fma(v_load(v + i), v_all(p.beta2), v_mul(v_mul(G, G), v_all(p.one_minus_beta2)));
        v_store(m + i, M);
        v_store(v + i, V);
        const Vector change = v_div(v_mul(M, v_all(p.eta)), v_fma(v_sqrt(V), v_all(p.scale), v_all(p.eps)));
        Vector T = v_load(theta + i);
        const Vector over_mu = v_sub(T, v_all(p.mu));
        const Vector push = v_sub(v_where(v_greater(over_mu, zero), prior), v_where(v_greater(zero, over_mu), prior));
        T = v_mul(v_sub(v_sub(v_mul(T, S), change), v_mul(push, S)), S);
        v_store(theta + i, T);
        const Vector W = v_mul(v_max(zero, T), S);
        if (streamed)
            v_stream(w + i, W);
        else
            v_store(w + i, W);
        found |= v_bits(v_beyond(G, bound)) | v_bits(v_beyond(W, bound));
    }
    return found != 0;
}
#endif

/* One step of Grad Rewiring. */
void grad_rewiring_step(Parameter *of, const Settings *settings) {
    const Step p = begin(of, settings);
    float *w = of->w, *m = of->m, *v = of->v, *x = of->max_v ? of->max_v : v, *theta = of->theta;
    const float *grad = of->grad;
    const int8_t *sign = of->sign;
    const int64_t n = of->n;
    const float bound = most(n);
    int64_t done = 0;
    int beyond = 0;
#ifdef WIDTH
    if (x == v && p.weight_decay == 0.0f) {
        const int streamed = n >= (1 << 22) && ((uintptr_t)w & 63) == 0;
        done = n / 16 * 16;
        _Pragma("omp parallel reduction(| : beyond)")
        {
            _Pragma("omp for schedule(static) nowait")
            for (int64_t i = 0; i < done; i += 16)
                beyond |= grad_rewiring_sixteen(w + i, grad + i, m + i, v + i, sign + i, theta + i, p, bound, streamed);
            end_stream();
        }
    }
#endif
    _Pragma("omp parallel for simd schedule(static) reduction(| : beyond) if (done < n)")
    for (int64_t i = done; i < n; i++) {
        grad_rewiring_one(w + i, grad[i], m + i, v + i, x + i, (float)sign[i], theta + i, p);
        beyond |= !(fabsf(grad[i]) <= bound) | !(fabsf(w[i]) <= bound);
    }
    of->moderate = !beyond;
}

/* What the steps of Deep R below draw for n weights: the normal numbers of each group, in sequence, and which weights
 * are chosen with a probability. */
void deep_rewiring_draws(float *normal, uint8_t *chosen, int64_t n, uint64_t seed, double probability) {
    for (int64_t start = 0; start < n; start += GROUP) {
        float z[GROUP];
        normals(seed, start / GROUP, GROUP, 1.0f, z);
        memcpy(normal + start, z, sizeof(float) * (n - start < GROUP ? n - start : GROUP));
    }
    for (int64_t start = 0; start < n; start += CHUNK) {
        uint16_t places[CHUNK];
        const int size = (int)(n - start < CHUNK ? n - start : CHUNK);
        const int count = choose(seed, start / CHUNK, size, probability, places);
        memset(chosen + start, 0, size);
        for (int i = 0; i < count; i++) chosen[start + places[i]] = 1;
    }
}

#ifdef WIDTH
/* WIDTH weights of Deep R, without weight decay and running maximum; for the rest see deep_rewiring_group. */
static INLINE void deep_rewiring_vector(float *w, const float *g, float *m, float *v, const int8_t *sign, float *theta,
                                        const float *noise, Step p, int32_t counts[2]) {
    const Vector zero = v_all(0.0f), one = v_all(1.0f);
    const Vector S = v_signs(sign), W = v_load(w), G = v_mul(v_load(g), v_all(p.direction));
    const Vector M = v_fma(G, v_all(p.one_minus_beta1), v_mul(v_load(m), v_all(p.beta1)));
    const Vector V = v_fma(v_mul(v_all(p.one_minus_beta2), G), G, v_mul(v_load(v), v_all(p.beta2)));
    v_store(m, M);
    v_store(v, V);
    const Vector change = v_div(v_mul(M, v_all(p.eta)), v_add(v_div(v_sqrt(V), v_all(p.correction)), v_all(p.eps)));
    const Mask active = v_differ(W, zero);
    const Vector ones = v_where(active, one); /* products with it are exact, and hide no NaN */
    Vector h = theta ? v_mul(v_load(theta), S) : W;
    h = v_sub(h, v_mul(change, ones));
    h = v_sub(h, v_mul(v_mul(S, v_all(p.penalty)), ones));
    h = v_add(h, v_load(noise));
    const Vector T = v_mul(h, S);
    if (theta) {
        const Vector bounded = v_max(v_all(p.bound), T);
        v_store(theta, bounded);
        v_store(w, v_mul(v_max(zero, bounded), S));
        return;
    }
    h = v_mul(h, v_where(v_both(active, v_greater(T, zero)), one));
    v_store(w, h);
    const Mask dormant = v_equal(h, zero);
    counts[0] += __builtin_popcount(v_bits(dormant));
    counts[1] += __builtin_popcount(v_bits(v_both(dormant, v_differ(S, zero))));
}
#endif

/* Up to GROUP weights of Deep R, soft where theta is not null; each operation rounds as that of
 * deeprewire.DeepRewiring does, whose symbols these are, so that the weights are bitwise the same. max_v is null without
 * amsgrad. Adds to counts the dormant connections and those of them that have a sign. */
static INLINE void deep_rewiring_group(float *w, const float *grad, float *m, float *v, float *max_v,
                                       const int8_t *sign, float *theta, const float *noise, int n, Step p,
                                       int32_t counts[2]) {
    int done = 0;
#ifdef WIDTH
    if (!max_v && p.weight_decay == 0.0f)
        for (; done + WIDTH <= n; done += WIDTH)
            deep_rewiring_vector(w + done, grad + done, m + done, v + done, sign + done, theta ? theta + done : 0,
                                 noise + done, p, counts);
#endif
    float signs[GROUP]; /* apart, so that the loops below take as many weights at a time as fit a vector of floats */
    SIMD
    for (int i = done; i < n; i++) signs[i] = (float)sign[i];
    SIMD
    for (int i = done; i < n; i++) {
        const float s = signs[i], active = w[i] != 0.0f ? 1.0f : 0.0f;
        float g = p.direction * grad[i];
        g = p.weight_decay != 0.0f ? fmaf(w[i], p.weight_decay, g) : g;
        m[i] = fmaf(g, p.one_minus_beta1, m[i] * p.beta1);
        v[i] = fmaf(p.one_minus_beta2 * g, g, v[i] * p.beta2);
        float x = v[i];
        if (max_v) max_v[i] = x = max_v[i] > x ? max_v[i] : x;
        const float change = active * (m[i] * p.eta / (sqrtf(x) / p.correction + p.eps));
        if (theta) {
            const float h = theta[i] * s - change - active * (s * p.penalty) + noise[i];
            const float t = h * s < p.bound ? p.bound : h * s;
            theta[i] = t;
            w[i] = (t < 0.0f ? 0.0f : t) * s; /* NaN stays NaN, as in torch */
        } else {
            float h = w[i] - change - active * (s * p.penalty) + noise[i];
            h *= (active != 0.0f && h * s > 0.0f) ? 1.0f : 0.0f; /* and here */
            w[i] = h;
        }
    }
    if (theta) return;
    int32_t dormant = 0, candidates = 0;
    _Pragma("omp simd reduction(+ : dormant, candidates)")
    for (int i = done; i < n; i++) {
        dormant += w[i] == 0.0f;
        candidates += (w[i] == 0.0f) & (signs[i] != 0.0f);
    }
    counts[0] += dormant;
    counts[1] += candidates;
}

/* Noise for the active ones of up to GROUP weights, the group's numbers in turn; 0 for the others. */
static void noise_of_the_active(const float *w, int n, uint64_t seed, int64_t group, float scale, float *noise) {
    float z[GROUP];
    int active = 0;
    _Pragma("omp simd reduction(+ : active)")
    for (int i = 0; i < n; i++) active += w[i] != 0.0f;
    normals(seed, group, active, scale, z);
    int taken = 0, i = 0;
#ifdef WIDTH
    for (; i + WIDTH <= n; i += WIDTH) {
        const Mask mask = v_differ(v_load(w + i), v_all(0.0f));
        v_store(noise + i, v_spread(mask, z + taken)); /* reads within z, as taken <= i */
        taken += __builtin_popcount(v_bits(mask));
    }
#endif
    for (; i < n; i++) {
        noise[i] = w[i] != 0.0f ? z[taken] : 0.0f;
        taken += w[i] != 0.0f;
    }
}

/* Re-activates each dormant connection at s * eps with a probability. */
static void reactivate(float *w, const int8_t *sign, int64_t n, uint64_t seed, double probability, float eps) {
    THREADED
    for (int64_t start = 0; start < n; start += CHUNK) {
        uint16_t places[CHUNK];
        const int size = (int)(n - start < CHUNK ? n - start : CHUNK);
        const int count = choose(seed, start / CHUNK, size, probability, places);
        for (int i = 0; i < count; i++) {
            float *x = w + start + places[i];
            if (*x == 0.0f) *x = (float)sign[start + places[i]] * eps;
        }
    }
}

/* One step of Deep R, soft where there is theta. Afterwards at most max_s of the weights are dormant, in expectation;
 * soft Deep R ignores max_s. */
void deep_rewiring_step(Parameter *of, const Settings *settings, uint64_t seed) {
    const Step p = begin(of, settings);
    float *w = of->w, *m = of->m, *v = of->v, *max_v = of->max_v, *theta = of->theta;
    const float *grad = of->grad;
    const int8_t *sign = of->sign;
    const int64_t n = of->n;
    const double max_s = settings->max_s;
    static const float zeros[GROUP];
    const float bound = most(n);
    int64_t dormant = 0, candidates = 0;
    int beyond = !(p.eps <= bound); /* of what is re-activated */
    _Pragma("omp parallel for schedule(static) reduction(+ : dormant, candidates) reduction(| : beyond)")
    for (int64_t start = 0; start < n; start += GROUP) {
        const int size = (int)(n - start < GROUP ? n - start : GROUP);
        float drawn[GROUP];
        const float *noise = p.temperature != 0.0f ? drawn : zeros;
        int32_t counts[2] = {0, 0};
        if (p.temperature != 0.0f) {
            if (theta)
                normals(seed, start / GROUP, size, p.temperature, drawn);
            else
                noise_of_the_active(w + start, size, seed, start / GROUP, p.temperature, drawn);
        }
        /* with theta and max_v known to be null or not: a loop of its own for each case */
        float *W = w + start, *M = m + start, *V = v + start;
        const float *G = grad + start;
        const int8_t *S = sign + start;
        if (theta && max_v)
            deep_rewiring_group(W, G, M, V, max_v + start, S, theta + start, noise, size, p, counts);
        else if (theta)
            deep_rewiring_group(W, G, M, V, 0, S, theta + start, noise, size, p, counts);
        else if (max_v)
            deep_rewiring_group(W, G, M, V, max_v + start, S, 0, noise, size, p, counts);
        else
            deep_rewiring_group(W, G, M, V, 0, S, 0, noise, size, p, counts);
        dormant += counts[0];
        candidates += counts[1];
        _Pragma("omp simd reduction(| : beyond)")
        for (int i = 0; i < size; i++) beyond |= !(fabsf(G[i]) <= bound) | !(fabsf(W[i]) <= bound);
    }
    of->moderate = !beyond;
    if (theta || max_s >= 1.0 || !candidates) return;
    const double probability = ((double)dormant - max_s * (double)n) / (double)candidates;
    if (probability > 0.0) reactivate(w, sign, n, seed, probability < 1.0 ? probability : 1.0, p.eps);
}
